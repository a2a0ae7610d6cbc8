"""Reads from a .dex file which classes it defines and which methods they have; enough to see what R8 kept."""

import struct


def strings(data: bytes) -> list[str]:
    count, table = struct.unpack_from("<II", data, 0x38)
    values = []
    for index in range(count):
        at = struct.unpack_from("<I", data, table + 4 * index)[0]
        while data[at] & 0x80:  # the length, a number of seven bits a byte
            at += 1
        at += 1
        values.append(data[at : data.index(0, at)].decode("utf-8", "replace"))
    return values


def classes(data: bytes) -> dict[str, set[str]]:
    """The names of the classes that the file defines, as Java writes them, with the names of their methods."""
    if data[:4] != b"dex\n":
        raise ValueError("not a .dex file")
    texts = strings(data)
    type_count, type_table = struct.unpack_from("<II", data, 0x40)
    types = [texts[struct.unpack_from("<I", data, type_table + 4 * index)[0]] for index in range(type_count)]
    class_count, class_table = struct.unpack_from("<II", data, 0x60)
    defined = {types[struct.unpack_from("<I", data, class_table + 32 * index)[0]] for index in range(class_count)}
    found: dict[str, set[str]] = {java(name): set() for name in defined}
    method_count, method_table = struct.unpack_from("<II", data, 0x58)
    for index in range(method_count):
        owner, _, name = struct.unpack_from("<HHI", data, method_table + 8 * index)
        if types[owner] in defined:
            found[java(types[owner])].add(texts[name])
    return found


def java(descriptor: str) -> str:
    return descriptor[1:-1].replace("/", ".")
