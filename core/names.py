"""Names of files and labels as a terminal shows them: on one line, without control characters, and found again."""

from __future__ import annotations

__all__ = ["quoted_name", "shown_name"]

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", "'": "\\'"}


def shown_name(name: str) -> str:
    r"""A name as it is if all of it can be printed, else as bash and zsh write it: `$'a\nb\xff.png'`.

    Typed so, it is the same name again, also where its bytes are not UTF-8.
    """
    return name if name.isprintable() else f"$'{''.join(map(_escaped, name))}'"


def quoted_name(name: str) -> str:
    """A name in a message: as Python writes it, or as the shell does where its bytes are not UTF-8."""
    return shown_name(name) if any(0xDC80 <= ord(character) <= 0xDCFF for character in name) else repr(name)


def _escaped(character: str) -> str:
    code = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    if character.isprintable():
        return character
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python holds it
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
