"""Weakened zygotes and cribds, for controls: a copy of the packages in which the code of one guard is replaced.

Where a guard is a step of the plan, a control changes the plan instead (see `conftest.Plans`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import runtime
from runtime.zygote.launch import Zygote, launch

Edits = tuple[tuple[str, str, str], ...]  # file below runtime/ (or with a leading / the repository), text, replacement

NO_RESOLVE_IN_ROOT: Edits = (
    ("linux/files.py", "_IN_ROOT: Final = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS", "_IN_ROOT: Final = 0"),
    ("linux/files.py", 'encoded = os.fsencode(path) or b"."', 'encoded = os.fsencode(path.lstrip("/")) or b"."'),
    (
        "linux/files.py",
        'where = target if target.startswith("/")',
        'where = "/proc/self/root" + target if target[:1] == "/"',
    ),
)
"""Paths in a root file system are followed as the kernel does for anybody: out of it."""
RESOLVED_AS_A_STRING: Edits = (
    ("plan/mounts.py", "import os\nimport stat\n", "import os\nimport stat\nimport time\n"),
    (
        "plan/mounts.py",
        "    make = files.make_directories if directory else files.make_file\n    point = make(context.root, target)\n",
        """\
    top = os.readlink(f"/proc/self/fd/{context.root}")
    path = os.path.realpath(top + target)
    if not path.startswith(f"{top}/"):
        path = top + path
    time.sleep(0.001)
    os.makedirs(path if directory else os.path.dirname(path), exist_ok=True)
    if not directory:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    point = os.open(path, os.O_PATH)
""",
    ),
)
"""A mount's target is resolved to a path inside the root, which is right then, and used a millisecond later: one core
is enough for what changes in between."""
NO_CHECK_OF_PROC: Edits = (
    ("plan/mounts.py", 'if target in ("/proc", "/sys"):', "if not target:"),
    ("plan/mounts.py", "if os.fstat(point).st_dev == context.proc_device and", "if not target and"),
)
"""Links of the image may take the place of /proc, or lead into it."""
NO_READ_ONLY_WORLD: Edits = (
    ("zygote/__main__.py", 'mount_setattr(AT_FDCWD, "/", set_=MountAttr.RDONLY, recursive=True)', "pass"),
)
"""The interpreter's files are mapped from where they are."""
IMPORTS_WORK: Edits = (
    ("zygote/zygote.py", "sys.path.clear()", "pass"),
    ("zygote/zygote.py", "sys.meta_path.clear()", "pass"),
    ("zygote/zygote.py", "sys.path_hooks.clear()", "pass"),
    ("zygote/zygote.py", "sys.path_importer_cache.clear()", "pass"),
)
"""The import machinery is left as it was."""


def packages(directory: Path, *edits: Edits) -> Path:
    """A directory below `directory` with copies of crib's packages, with these edits."""
    copy, here = directory / "weak", Path(runtime.__file__ or "").parents[1]
    for name in ("cri", "net", "runtime"):
        shutil.copytree(here / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text, replacement in (edit for group in edits for edit in group):
        path = copy / name[1:] if name.startswith("/") else copy / "runtime" / name
        source = path.read_text()
        assert source.count(text) == 1, f"{name} has {source.count(text)} of {text!r}"
        path.write_text(source.replace(text, replacement))
    return copy


def zygote(directory: Path, monkeypatch: pytest.MonkeyPatch, *edits: Edits) -> Zygote:
    """A zygote of such a copy."""
    copy = packages(directory, *edits)
    with monkeypatch.context() as patch:
        patch.setattr("runtime.zygote.launch.__file__", str(copy / "runtime/zygote/launch.py"))
        return launch()
