"""What benchmarks say of the machine they ran on, and how they keep their rows."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any


def machine() -> str:
    """Processor and number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def about() -> dict[str, Any]:
    """What stands in every row: the machine, the commit, and the versions of packages."""
    from fedsim.provenance import commit, versions  # here: the bare loop's processes import this file, too

    return {"machine": machine(), "commit": commit(), **versions()}


def append(row: dict[str, Any], out: Path | None) -> None:
    """One more JSON line, where a file is given."""
    if out:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
