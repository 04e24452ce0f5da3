"""What a compiled program repeats: the bodies of its loops, as HLO text."""

import re


def computations(text: str) -> dict[str, str]:
    """The computations of an HLO module, by name."""
    found = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S)
    return dict(found)


def loop_bodies(compiled) -> list[str]:
    """The while bodies of a program, each with all it calls except inner loops."""
    parts = computations(compiled.as_text())

    def inlined(name: str) -> str:
        lines = [line for line in parts[name].splitlines() if " while(" not in line]
        text = "\n".join(lines)
        called = re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text)
        return "\n".join([text, *map(inlined, called)])

    names = {
        name
        for part in parts.values()
        for name in re.findall(r" while\(.*?body=%?([\w.\-]+)", part)
    }
    return [inlined(name) for name in sorted(names)]


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))
