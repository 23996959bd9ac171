"""A griffe extension: argument lists of classes and functions that refer to those of others.

A docstring that says "Arguments are those of ``X``." or "Other arguments are those of ``X``, except
``a`` and ``b``." gets the entries of X's Args section for the reference, in X's order, with its own
in place of them. A class also gets the entries of its base classes, for the arguments that it
takes. So each argument is described once in the source.

It also lets a name that a package imports from a module of the same name stand for the import.
"""

import re
from typing import Any

import griffe

REFERENCE = re.compile(r"[Aa]rguments\s+are\s+those\s+of\s+``(\w+)``(?:,?\s+except\s+([^.]+))?\.")
SECTION = re.compile(r"^Args:\n((?:[ \t]+.*\n?|\n(?=[ \t]))*)", re.MULTILINE)
LATER = re.compile(r"^(?:Returns|Yields|Raises|Examples|Attributes):$", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\*{0,2}\w+)(?: \([^)]*\))?:.*\n?(?:(?: {5,}.*)?\n?)*", re.MULTILINE)


class InheritArguments(griffe.Extension):
    """Completes the Args sections of a package that was loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        done: set[str] = set()
        for module in modules(pkg):
            retarget(module, pkg)
            for member in list(module.members.values()):
                if not member.is_alias and (member.is_class or member.is_function):
                    complete(member, done)


def modules(module: Any) -> list[Any]:
    """A module and all below it."""
    inner = [m for m in module.members.values() if not m.is_alias and m.is_module]
    return [module, *(found for each in inner for found in modules(each))]


def retarget(module: Any, pkg: Any) -> None:
    """Let names stand for the function that they import from a module of the same name."""
    for name, member in list(module.members.items()):
        if member.is_alias and member.target_path.startswith(f"{pkg.path}."):
            target = below(pkg, member.target_path.split(".")[1:])
            if target is not None and target.is_module and name in target.members:
                module.set_member(name, griffe.Alias(name, target.members[name], parent=module))


def below(module: Any, names: list[str]) -> Any:
    """The member of members with these names, or None if one of them is imported."""
    for name in names:
        module = module.members.get(name)
        if module is None or module.is_alias:
            return None
    return module


def complete(member: Any, done: set[str]) -> None:
    """Complete one docstring, after those that it refers to."""
    if member.path in done:
        return
    done.add(member.path)
    if member.docstring is None:
        return
    text = member.docstring.value
    own = entries(text)
    given: dict[str, str] = {}
    for base in bases(member):
        complete(base, done)
        taken = {parameter.name for parameter in member.parameters}
        given |= {
            name: entry
            for name, entry in entries_of(base).items()
            if name.lstrip("*") in taken or "__init__" not in member.members
        }
    if match := REFERENCE.search(text):
        name, left_out = match.groups()
        known = member.module.members
        source = known[name] if name in known else member.package.members[name]
        source = source.final_target if source.is_alias else source
        complete(source, done)
        except_for = re.findall(r"``(\w+)``", left_out or "")
        given |= {n: entry for n, entry in entries_of(source).items() if n not in except_for}
    if merged := merge(given, own):
        member.docstring.value = with_section(text, "".join(merged.values()))


def bases(member: Any) -> list[Any]:
    """The base classes of a class, the farthest first, as far as they are in this package."""
    if not member.is_class:
        return []
    try:
        return list(reversed(member.mro()))
    except ValueError:
        return []


def entries_of(member: Any) -> dict[str, str]:
    """The entries of a member's Args section."""
    return entries(member.docstring.value) if member.docstring else {}


def entries(text: str) -> dict[str, str]:
    """The lines of each argument."""
    section = SECTION.search(text)
    found = ENTRY.finditer(section[1]) if section else ()
    return {match[1]: f"{match[0].rstrip()}\n" for match in found}


def merge(given: dict[str, str], own: dict[str, str]) -> dict[str, str]:
    """Given entries in their order, own ones in their place or after the own one before them."""
    merged = dict(given)
    before = None
    for name, entry in own.items():
        if name in merged:
            merged[name] = entry
        else:
            items = list(merged.items())
            place = list(merged).index(before) + 1 if before in merged else 0
            merged = dict([*items[:place], (name, entry), *items[place:]])
        before = name
    return merged


def with_section(text: str, body: str) -> str:
    """The docstring with these arguments."""
    section = f"Args:\n{body}"
    if match := SECTION.search(text):
        rest = text[match.end() :].lstrip("\n")
        return f"{text[: match.start()]}{section}" + (f"\n{rest}" if rest else "")
    later = LATER.search(text)
    if later is None:
        return f"{text.rstrip()}\n\n{section}"
    return f"{text[: later.start()]}{section}\n{text[later.start() :]}"
