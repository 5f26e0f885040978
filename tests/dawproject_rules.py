"""What DAWproject 1.0 asks of the elements that Backline writes, for machines without the published schemas.

The schemas (Project.xsd and MetaData.xsd of https://github.com/bitwig/dawproject) are used beside this where
they are: in the folder that $BACKLINE_DAWPROJECT_SCHEMAS names, or in shared/dawproject beside the project.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lxml import etree

DEVICE = "(Parameters )?(Enabled )?(State )?"
# The children of an element, in order, each followed by a space.
CHILDREN = {
    "Project": "Application (Transport )?(Structure )?(Arrangement )?(Scenes )?",
    "Transport": "(Tempo )?(TimeSignature )?",
    "Structure": "(Track |Channel )*",
    "Track": "(Channel )?(Track )*",
    "Channel": "(Devices )?(Mute )?(Pan )?(Sends )?(Volume )?",
    "Devices": "(Vst3Plugin |BuiltinDevice |Compressor |Limiter |NoiseGate )*",
    "Parameters": "(RealParameter |BoolParameter |EnumParameter )*",
    "Vst3Plugin": DEVICE,
    "BuiltinDevice": DEVICE,
    "Compressor": DEVICE
    + "(Attack )?(AutoMakeup )?(InputGain )?(OutputGain )?(Ratio )?(Release )?(Threshold )?",
    "Limiter": DEVICE + "(Attack )?(InputGain )?(OutputGain )?(Release )?(Threshold )?",
    "NoiseGate": DEVICE + "(Attack )?(Range )?(Ratio )?(Release )?(Threshold )?",
    "Arrangement": "(Lanes )?(Markers )?(TempoAutomation )?(TimeSignatureAutomation )?",
    "Lanes": "(Lanes |Clips )*",
    "Clips": "(Clip )*",
    "Clip": "(Audio |Clips |Warps )?",
    "Audio": "File ",
    "Markers": "(Marker )*",
    "TempoAutomation": "Target (RealPoint )*",
    "TimeSignatureAutomation": "Target (TimeSignaturePoint )*",
}
REAL = {"id", "name", "unit", "value", "min", "max"}
FLAG = {"id", "name", "value"}
EFFECT = {"id", "name", "deviceName", "deviceRole", "deviceID", "deviceVendor", "loaded"}
# The attributes an element may have; those after the bar it must have.
ATTRIBUTES: dict[str, tuple[set[str], set[str]]] = {
    "Project": ({"version"}, {"version"}),
    "Application": ({"name", "version"}, {"name", "version"}),
    **{
        name: (REAL, {"unit"})
        for name in ("Tempo", "Pan", "Volume", "RealParameter", "Attack", "Ratio", "Release", "Threshold")
    },
    **{name: (FLAG, set()) for name in ("Mute", "Enabled", "BoolParameter")},
    "EnumParameter": (FLAG | {"count", "labels"}, {"count"}),
    "TimeSignature": ({"id", "numerator", "denominator"}, {"numerator", "denominator"}),
    "Track": ({"id", "name", "comment", "contentType", "loaded"}, set()),
    "Channel": ({"id", "destination", "role", "audioChannels", "solo"}, set()),
    **{
        name: (EFFECT, {"deviceName", "deviceRole"})
        for name in ("Vst3Plugin", "BuiltinDevice", "Compressor", "Limiter", "NoiseGate")
    },
    "State": ({"path", "external"}, {"path"}),
    "File": ({"path", "external"}, {"path"}),
    "Arrangement": ({"id"}, set()),
    "Lanes": ({"id", "timeUnit", "track"}, set()),
    "Clips": ({"id", "timeUnit", "track"}, set()),
    "Clip": (
        {"name", "time", "duration", "contentTimeUnit", "playStart", "playStop"}
        | {"fadeTimeUnit", "fadeInTime", "fadeOutTime"},
        {"time"},
    ),
    "Audio": (
        {"id", "timeUnit", "algorithm", "channels", "sampleRate", "duration"},
        {"channels", "sampleRate", "duration"},
    ),
    "Markers": ({"id", "timeUnit"}, set()),
    "Marker": ({"time", "name", "color", "comment"}, {"time"}),
    "TempoAutomation": ({"id", "timeUnit", "unit"}, set()),
    "TimeSignatureAutomation": ({"id", "timeUnit"}, set()),
    "Target": ({"parameter"}, set()),
    "RealPoint": ({"time", "value", "interpolation"}, {"time", "value"}),
    "TimeSignaturePoint": ({"time", "numerator", "denominator"}, {"time", "numerator", "denominator"}),
    **{name: (set(), set()) for name in ("Transport", "Structure", "Devices", "Parameters", "Scenes")},
}
INTEGER, REAL_NUMBER, BOOLEAN = r"\d+", r"-?\d+(\.\d+)?(e[-+]?\d+)?", "true|false"
VALUES = {
    "unit": "linear|normalized|percent|decibel|hertz|semitones|seconds|beats|bpm",
    "timeUnit": "beats|seconds",
    "contentTimeUnit": "beats|seconds",
    "fadeTimeUnit": "beats|seconds",
    "deviceRole": "instrument|noteFX|audioFX|analyzer",
    "role": "regular|master|effect|submix|vca",
    "interpolation": "hold|linear",
    "contentType": "((audio|automation|notes|video|markers|tracks) ?)*",
    "id": r"[A-Za-z_][\w.-]*",
    **dict.fromkeys(("solo", "loaded", "external"), BOOLEAN),
    **dict.fromkeys(
        ("channels", "sampleRate", "audioChannels", "numerator", "denominator", "count"), INTEGER
    ),
    **dict.fromkeys(("time", "duration", "playStart", "playStop", "fadeInTime", "fadeOutTime"), REAL_NUMBER),
}


def broken_rules(project: etree._Element) -> list[str]:
    """What in a project.xml is not as DAWproject 1.0 asks; only elements that Backline writes are known."""
    broken = [] if project.tag == "Project" else [f"the root is {project.tag}"]
    ids = [node.get("id") for node in project.iter() if node.get("id")]
    broken += [f"the id {name} is not unique" for name in ids if ids.count(name) > 1]
    for node in project.iter():
        children = "".join(f"{child.tag} " for child in node)
        if not re.fullmatch(CHILDREN.get(node.tag, ""), children):
            broken.append(f"{node.tag} holds {children}")
        allowed, needed = ATTRIBUTES.get(node.tag, (set(), {"a place among the known elements"}))
        if not needed <= set(node.attrib) <= allowed:
            broken.append(f"{node.tag} has {sorted(node.attrib)}")
        for name, value in node.attrib.items():
            if not re.fullmatch(VALUES.get(name, ".*"), value):
                broken.append(f"{node.tag} has {name}={value}")
            if name in ("track", "destination", "parameter") and value not in ids:
                broken.append(f"{node.tag} points to {value}, which is not there")
    return broken


def schema(name: str) -> etree.XMLSchema | None:
    """A published schema, None where it is not on this machine."""
    beside = Path(__file__).parents[2] / "shared" / "dawproject"
    path = Path(os.environ.get("BACKLINE_DAWPROJECT_SCHEMAS") or beside) / name
    return etree.XMLSchema(etree.parse(path)) if path.is_file() else None
