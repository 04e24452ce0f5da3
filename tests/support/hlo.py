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


def assert_no_more(found: list[int], expected: list[int]) -> None:
    """Loops with at most so many of something, and at most so many such loops."""
    found = sorted((n for n in found if n), reverse=True)
    expected = sorted(expected, reverse=True)
    assert found, "the pattern finds nothing"
    assert len(found) <= len(expected), (found, expected)
    assert all(a <= b for a, b in zip(found, expected, strict=False)), (found, expected)


def whole_loops(compiled) -> list[str]:
    """The while bodies of a program, each with all it calls, inner loops included."""
    parts = computations(compiled.as_text())

    def called(name: str) -> list[str]:
        text = parts[name]
        names = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", text)
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", text):
            names += re.findall(r"[\w.\-]+", branches)
        return names

    def reached(name: str) -> dict[str, None]:
        seen, waiting = {name: None}, [name]
        while waiting:
            new = [other for other in called(waiting.pop()) if other not in seen]
            seen |= dict.fromkeys(new)
            waiting += new
        return seen

    bodies = {
        body
        for part in parts.values()
        for body in re.findall(r" while\(.*?body=%?([\w.\-]+)", part)
    }
    return ["\n".join(map(parts.get, reached(body))) for body in sorted(bodies)]
