"""What a track plays, guessed from its name, in the words musicians write on tracks in several languages."""

from __future__ import annotations

import re
import unicodedata

OTHER = "other"  # material that is no stem of a model: vocals, strings, synthesizers, ...

# Whole words, without accents. Words of other scripts and long ones are also found inside longer words.
WORDS: dict[str, str] = {
    "bass": """
        bass basses bs bss bassline sub subbass upright contrabass doublebass slapbass fretless
        bassgitarre ebass kontrabass e-bass basse contrebasse bajo baixo contrabajo contrabaixo basso
        contrabbasso basgitaar bas kontrabas basgitarr bassokitara gitara-basowa basowa baskytara ベース
        ベースギター コントラバス 베이스 贝斯 貝斯 低音吉他 бас басгитара контрабас
    """,
    "drums": """
        drum drums drumkit drumset drumloop kit kick kik bd bassdrum snare snares sn sd hihat hihats hh
        hat hats tom toms cymbal cymbals crash ride overhead overheads oh percussion perc beat beats
        breakbeat cajon bongo bongos conga congas shaker tambourine clap claps rim rimshot roomdrums
        schlagzeug trommel trommeln perkussion becken bassdrum batterie batteur grossecaisse caisseclaire
        cymbale percussions bateria bombo caja platillos percusion percussao caixa pratos bumbo batteria
        cassa rullante piatti percussioni drumstel slagwerk trommels trummor trommer slagverk rummut
        perkusja bicie ドラム ドラムス ドラムセット パーカッション 打楽器 太鼓 드럼 타악기 鼓 架子鼓
        爵士鼓 барабан барабаны ударные
    """,
    "guitar": """
        guitar guitars gtr gtrs gt guit gui git eguitar aguitar acousticguitar electricguitar strat
        telecaster tele lespaul nylon powerchords gitarre gitarren egitarre agitarre konzertgitarre
        klampfe guitare guitares guitarra guitarras violao viola-caipira chitarra chitarre gitaar gitaren
        gitarr gitarrer kitara gitara gitary kytara gitar ukulele ギター エレキギター アコギ 기타 吉他
        结他 結他 гитара гитары
    """,
    "piano": """
        piano pianos pno pf pianoforte epiano keys key keyboard keyboards kbd kbds rhodes wurli wurlitzer
        wurly steinway grandpiano clav clavinet klavier flugel tasten tasteninstrument clavier claviers
        piano-a-queue teclado teclados tecla tastiera tastiere toetsen toetsenbord vleugel flygel klaver
        piaano fortepian pianino ピアノ エレピ キーボード 鍵盤 피아노 건반 钢琴 鋼琴 键盘 пианино
        фортепиано рояль клавишные
    """,
    OTHER: """
        vocal vocals vox voc voice voices singer choir bgv bvox leadvox rap acapella talk gesang stimme
        stimmen chor chant voix choeur choeurs voz voces vozes coro canto voce voci cori zang zanger koor
        sang laulu wokal spiew ボーカル 歌 コーラス 보컬 노래 人声 人聲 вокал голос хор string strings
        violin violins viola violas cello cellos celli orchestra streicher geige geigen cordes violon
        violoncelle cuerdas violin cordas archi violino strijkers viool skrzypce smyczki バイオリン
        ストリングス 弦 바이올린 弦乐 brass horn horns trumpet trumpets trombone tuba sax saxes saxophone
        flute oboe clarinet bassoon fagott woodwind winds blaser trompete posaune flote klarinette cuivres
        trompette metales trompeta metais trompete fiati ottoni tromba blazers fagot サックス トランペット
        フルート 색소폰 小号 труба саксофон скрипка synth synths synthesizer pad pads lead leads arp pluck
        orgel organ orgue organo hammond b3 harmonica accordion akkordeon harp fx sfx effects noise
        ambience atmo riser click metronome クリック シンセ オルガン 신스 合成器 синтезатор mix master
        bounce residual
    """,
}
LONG = 5  # letters; a word of at least as many also counts as part of a compound ("Konzertgitarrenspur")


def guess_role(name: str) -> str | None:
    """bass, drums, guitar, piano, or other for what is none of them; None where the name does not tell.

    A bass guitar is a bass and a bass drum a drum; of two other roles in one name neither is guessed.
    """
    found = {role for word in _words(name) for role in _roles(word)}
    joined = "".join(_words(name))
    if found >= {"bass", "drums"} and any(word in joined for word in ("bassdrum", "bassedrum")):
        return "drums"
    if found >= {"bass", "guitar"}:
        found -= {"guitar"}
    stems = found - {OTHER}
    if len(stems) > 1:
        return None
    return next(iter(stems or found), None)


def _roles(word: str) -> set[str]:
    """The roles a word stands for: what it is, else what is in it."""
    exact = {role for role, known in _KNOWN.items() if word in known}
    if exact:
        return exact
    inside = {
        (len(part), role)
        for role, known in _KNOWN.items()
        for part in known
        if (len(part) >= LONG or not part.isascii()) and part in word
    }
    longest = max((length for length, _ in inside), default=0)
    return {role for length, role in inside if length == longest}


def _words(name: str) -> list[str]:
    """ "E-Gitarre 2 (DI)" -> ["e", "gitarre", "di"], with "egitarre" for what a hyphen joins."""
    split_case = re.sub(r"(?<=[a-zà-ÿ])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    words = re.split(r"[^\w'-]|_|\d", _plain(split_case))
    parts: list[str] = []
    for word in words:
        pieces = [piece for piece in re.split(r"[-']", word) if piece]
        parts += pieces
        if len(pieces) > 1:
            parts.append("".join(pieces))
    return parts


def _plain(text: str) -> str:
    """Lower case, Latin letters without their accents; other scripts as they are."""
    result = []
    for letter in text.lower().replace("ß", "ss"):
        base = unicodedata.normalize("NFD", letter)
        result.append(base[0] if base[0].isascii() else letter)
    return "".join(result)


_KNOWN = {role: frozenset(_plain(words).replace("-", "").split()) for role, words in WORDS.items()}
