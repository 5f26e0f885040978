"""Track names as they are met, and what they play."""

from __future__ import annotations

import pytest

from plugin_host.roles import guess_role

NAMES = {
    "bass": (
        "Bass|BASS DI|bass guitar|E-Bass|Kontrabass 2|Bassgitarre|Basse|Guitare basse|Bajo|"
        "Baixo elétrico|Basso|basgitaar|ベース|synth bass|Sub_Bass_01|BassLine|베이스|贝斯|бас|"
        "contrebasse|Upright"
    ),
    "drums": (
        "Drums|drum bus|Kick|bass drum|Bassdrum In|Snare Top|OH L|Overheads|Hi-Hat|Schlagzeug|"
        "SCHLAGZEUG-RAUM|Batterie|Batería|Bateria|Batteria|Drumstel|Slagwerk|ドラム|ドラムス 1|"
        "Percussion|드럼|鼓|ударные|Drumloop 120bpm|Tom 2"
    ),
    "guitar": (
        "Guitar|Gtr 1|E-Gitarre|Konzertgitarre|ElecGtr|acoustic guitar L|Guitare|Guitarra|Chitarra|"
        "Gitaar|Violão|ギター|아코 기타|吉他|гитара|Gitarren"
    ),
    "piano": (
        "Piano|Grand Piano|Klavier|Flügel|Keys|Keyboard|E-Piano|Rhodes MkI|Pianoforte|Tastiera|Teclado|"
        "Clavier|Toetsen|ピアノ|피아노|钢琴|фортепиано|Pno|piano à queue"
    ),
    "other": (
        "Vocals|Lead Vox|Gesang|Voix|Voz|Voce|Zang|ボーカル|Strings|Violine 1|Sax|Bassoon|Synth Lead|"
        "Pad|Orgel|Choir|FX|Brass|Bläser|Vocal loop Lead"
    ),
}
CASES = [(name, role) for role, names in NAMES.items() for name in names.split("|")]


@pytest.mark.parametrize(("name", "role"), CASES)
def test_names(name: str, role: str) -> None:
    assert guess_role(name) == role


@pytest.mark.parametrize(
    "name", ["Audio 1", "Track 12", "", "Untitled", "トラック", "guitar and piano", "Spur 3", "2"]
)
def test_a_name_that_does_not_tell(name: str) -> None:
    assert guess_role(name) is None
