"""Compares what wheels bundle with what they say that they bundle; a program.

    python tests/wheel_contents.py WHEEL ...

Compiled files are the extension and the libraries that `auditwheel` put beside it, and each library is in its bill of
materials, in the list of licences and needed by the extension. Components of the project's own bill of materials are
where it says, with the content that it says. Licence texts of the list are in the wheel. Prints a line for each
difference; the exit code is 1 if there is one. It needs the standard library only, as it runs in containers too.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from zipfile import ZipFile

ELF = b"\x7fELF"


def differences(wheel: Path) -> list[str]:
    """What `wheel` bundles and does not say, or says and does not bundle, a line each; empty if it is as it says."""
    with ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    (info,) = {name.partition("/")[0] for name in files if re.match(r"[^/]+\.dist-info/", name)}
    package, _, _ = info.partition("-")
    licences = {name.removeprefix(f"{info}/licenses/") for name in files if name.startswith(f"{info}/licenses/")}
    materials = {
        Path(name).name: json.loads(content)["components"]
        for name, content in files.items()
        if name.startswith(f"{info}/sboms/")
    }
    licence_list = files.get(f"{info}/licenses/licenses/README.md", b"").decode()
    listed = _listed(licence_list)
    compiled = [name for name, content in files.items() if content.startswith(ELF)]
    extensions = [name for name in compiled if name.startswith(f"{package}/_C.")]
    libraries = [name for name in compiled if name.startswith(f"{package}.libs/")]
    found = [
        f"{name} is compiled, and neither the extension nor in {package}.libs/"
        for name in compiled
        if name not in extensions + libraries
    ]
    if len(extensions) != 1:
        found.append(f"there must be one extension, {package}/_C.*, got {len(extensions)}")
    if f"{package}.cdx.json" not in materials:
        found.append(f"there is no bill of materials {info}/sboms/{package}.cdx.json")

    packaged = [one["name"] for one in materials.get("auditwheel.cdx.json", []) if one["name"] != package]
    places = {name: where for name, (where, _) in listed.items() if f"{package}.libs/" in where}
    for name in libraries:
        soname = Path(name).name
        stem = re.match(r"lib[^-.]+", soname)[0]
        if not any(files[extension].count(soname.encode()) for extension in extensions):
            found.append(f"{name} is needed by no extension")
        if not any(one.startswith(stem) for one in packaged):
            found.append(f"{name} is in no bill of materials, which have {', '.join(packaged) or 'no library'}")
        if stem not in places:
            found.append(f"{name} is not in licenses/README.md as one in {package}.libs/")
    for name in packaged:
        if not any(name.startswith(re.match(r"lib[^-.]+", Path(one).name)[0]) for one in libraries):
            found.append(f"auditwheel.cdx.json has {name}, of which there is no library")

    for component in materials.get(f"{package}.cdx.json", []):
        name = component["name"]
        if name not in licence_list:
            found.append(f"{package}.cdx.json has {name}, which is not in licenses/README.md")
        hashes = {one["content"] for one in component.get("hashes", [])}
        for occurrence in component.get("evidence", {}).get("occurrences", []):
            place = occurrence["location"]
            content = [files[one] for one in files if one == place or one.startswith(f"{place}.")]
            if not content:
                found.append(f"{name} is said to be in {place}, which is not there")
            elif hashes and hashes != {hashlib.sha256(one).hexdigest() for one in content}:
                found.append(f"{place} is not the {name} of {package}.cdx.json: it has another hash")
    texts = {text for _, texts in listed.values() for text in texts}
    found += [f"licenses/README.md names {text}, which is not there" for text in sorted(texts - licences)]
    return found if listed else [*found, "there is no list of licences, licenses/README.md"]


def _listed(table: str) -> dict[str, tuple[str, list[str]]]:
    """Name of what is bundled -> where, and the files of its licence."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0].partition(",")[0]: (row[1], re.findall(r"`([^`]+)`", row[3])) for row in rows[2:]}


def main(wheels: list[str]) -> int:
    found = [f"{Path(wheel).name}: {line}" for wheel in wheels for line in differences(Path(wheel))]
    print("\n".join(found) or f"{len(wheels)} wheel(s): bills of materials and licences are as they should be")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
