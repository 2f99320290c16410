"""What the command line shows, and what it keeps other libraries from showing. Results on stdout, all else on stderr."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._report_run import UNSCALED

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}
LOGGERS = (
    "transformers",
    "datasets",
    "huggingface_hub",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "nncf",
    "accelerate",
)


def quiet() -> None:
    """Keep load reports, progress bars and warnings of libraries off the terminal, here and in worker processes.

    Variables that the user has set stay as they are. Errors are shown as ever. A sign that the terminal's encoding lacks is a `?`.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if os.environ["PYTHONWARNINGS"] == "ignore":
        warnings.simplefilter("ignore")
    for logger in LOGGERS:
        logging.getLogger(logger).setLevel(logging.ERROR)


def own_name() -> str:
    """How to call this command from here: by its name, or by its path where the shell does not find it by that."""
    own, found = Path(sys.executable).with_name("multum"), shutil.which("multum")
    if not own.exists() or (found and Path(found).resolve() == own.resolve()):
        return "multum"
    near = os.path.relpath(own)
    return str(own) if near.startswith(os.pardir) else near


def out() -> Console:
    """For results."""
    return Console(highlight=False, soft_wrap=not os.isatty(1))


def err() -> Console:
    """For progress and messages."""
    return Console(stderr=True, highlight=False)


def complain(message: str) -> None:
    """One message to the person at the keyboard."""
    err().print(Text("Error: ", style="bold red") + Text(message), soft_wrap=True)


def say(message: str) -> None:
    """A remark beside the results."""
    err().print(Text(message), soft_wrap=True)


def print_json(value: Any) -> None:
    """JSON for programs, nothing else on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_json_list(values: Iterable[Any]) -> None:
    """The same of a list whose values are shown one by one, as they come."""
    before = "["
    for value in values:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        print(before, *(f"  {line}" for line in text.split("\n")), sep="\n", end="", flush=True)
        before = ","
    print("\n]" if before == "," else "[]")


def print_lines(*lines: str) -> None:
    """Plain text, exactly as it is."""
    print(*lines, sep="\n")


def print_forms(tried: Mapping[str, Any] | None) -> None:
    """The forms that what ships was tried in, and what was said of them, where it was; a blank line before and behind."""
    print_lines("")
    if tried:
        print_rows(tried["rows"], f"{tried['of']} in all forms, the model alone (* far slower, not timed to the end)")
        print_lines("", *(f"{line[:1].upper()}{line[1:]}" for line in tried["said"]), "")


def print_rows(rows: Sequence[Sequence[str]], title: str | None = None, *, marked: str | None = None) -> None:
    """A table: the first row is the header, the first column is text, the others are figures.

    Args:
        rows: texts, all rows equally long.
        title: above the table.
        marked: the first cell of the row to set off.
    """
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(rows[0]):
        table.add_column(str(name), justify="left" if number == 0 else "right", no_wrap=number > 0)
    for row in rows[1:]:
        table.add_row(*(Text(str(cell)) for cell in row), style="bold green" if row[0] == marked else "")
    console = out()
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    if title:  # not the table's own, which is folded to its width
        console.print(Text(title, style="bold"))
    console.print(table)


def print_metrics(names: Sequence[str], metrics: Sequence[Mapping[str, Any]], title: str) -> None:
    """`metrics.json` dicts as a table, and another of the further figures that the task tells of quality, by their names there."""
    print_rows(metric_rows(names, metrics), title)
    further = [{key: value for key, value in one["quality"]["others"].items() if isinstance(value, int | float)} for one in metrics]
    if keys := list(dict.fromkeys(key for one in further for key in one)):
        rows = [
            [name, *(_figure(one[key]) if key in one else "-" for key in keys)] for name, one in zip(names, further, strict=True)
        ]
        print_rows([["", *(key.replace("_", " ") for key in keys)], *rows], "Further figures, as metrics.json has them")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4g}"


def metric_rows(names: Sequence[str], metrics: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """`metrics.json` dicts as a table, header first; speed-ups are against the first. Qualities that are shares are in per cent."""
    metric = metrics[0]["quality"]["metric"].replace("_", " ")
    scale, digits, unit = (1, 3, "") if metric in UNSCALED else (100, 1, ", %")
    rows = [["", f"{metric}{unit} (95 %)", "runtime", "p50 ms", "threads", "speed-up", "texts/s", "MB", "parameters"]]
    writes = all("decode_tokens_per_s" in one["speed"] for one in metrics)
    rows[0] += ["first token ms", "decode tokens/s", "decode speed-up"] if writes else []
    for name, one in zip(names, metrics, strict=True):
        quality, speed, size = one["quality"], one["speed"], one["size"]
        value, low, high = (f"{scale * number:.{digits}f}" for number in (quality["value"], *quality["ci95"]))
        rows.append(
            [
                name,
                f"{value} ({low}–{high})",
                f"{speed['runtime']} {speed['precision']}",
                f"{speed['p50_ms']:.3g}",
                f"{speed['threads']}",
                f"{speed['ratio_to_first']['value']:.2f}x",
                f"{speed['examples_per_s']:.0f}",
                f"{size['bytes_on_disk'] / 1e6:.2f}",
                f"{size['parameters'] / 1e6:.1f} M",
                *(_pace(speed) if writes else []),
            ]
        )
    return rows


def _pace(speed: Mapping[str, Any]) -> list[str]:
    decode, faster = speed["decode_tokens_per_s"], speed["decode_ratio_to_first"]["value"]
    return [f"{speed['first_token_p50_ms']:.3g}", f"{decode:.4g}", f"{faster:.2f}x"]


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    console = out()
    console.print(Text(title, style="bold"))
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        console.print(Text(f"  {name:<{width}}  ", style="dim") + Text(_short(value)), soft_wrap=True)


def _short(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(one)!r}" for name, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_checkup(facts: Mapping[str, Any]) -> None:
    """What `doctor.examine` found."""
    processor, memory = facts["processor"], facts["memory"]
    usable = ", ".join(name for name, there in processor["features"].items() if there) or "none of note"
    print_facts(
        "This machine",
        {
            "processor": processor["name"],
            "cores": f"{processor['cores']} usable of {processor['cores_of_machine']}",
            "instructions": usable,
            "memory": f"{memory['available_mb']} MB free of {memory['total_mb']} MB",
            "accelerators": ", ".join(facts["accelerators"]) or "none",
            "system": f"{facts['system']['system']}, Python {facts['system']['python']}",
            "disk": f"{facts['disk']['free_gb']} GB free in {facts['disk']['folder']}",
            "cache": f"{facts['cache']['folder']} ({facts['cache']['used_mb']} MB)",
        },
    )
    print_facts(
        "Packages", {name: found or "not installed" for name, found in {"multum": facts["multum"], **facts["versions"]}.items()}
    )
    print_facts(
        "Runtimes",
        {
            name: ", ".join(runtime["precisions"]) + (f"; {runtime['kernels']}" if runtime.get("kernels") else "")
            if runtime["available"]
            else str(runtime["reason"])
            for name, runtime in facts["runtimes"].items()
        },
    )
    if facts["advice"]:
        print_facts("Could be better", {f"{number}.": text for number, text in enumerate(facts["advice"], start=1)})
    if "model" in facts:
        print_model(facts["model"])


def print_model(found: Mapping[str, Any]) -> None:
    """What `check_up` found of a model."""
    print_facts(f"The model {found['source']}", {**found["facts"], "exports": ", ".join(found["works"]) or "none"})
    print_facts("What cannot work" if found["limits"] else "Nothing stands in its way", {})
    console = out()
    for limit in found["limits"]:
        console.print(Text(f"  {limit['what']}", style="bold") + Text(f": {limit['why']}"), soft_wrap=True)
        console.print(Text("    instead: ", style="dim") + Text(limit["instead"]), soft_wrap=True)


def print_step(step: Mapping[str, Any]) -> None:
    """A step's formula and fields, as `catalogue.describe` gives them."""
    console = out()
    console.print(Text(step["name"], style="bold"), Text("\n" + step["formula"] + "\n"), sep="\n", soft_wrap=True)
    for field in step["fields"]:
        default = "must be given" if field["default"] is None else f"default {field['default']}"
        head = Text(f"  --{field['name']} ", style="bold") + Text(f"{field['type']}, {default}", style="dim")
        console.print(head, Text(f"      {field['about']}"), sep="\n", soft_wrap=True)
    console.print(
        Text(
            f"\nExample: multum apply {step['name']} MODEL --task T --data D -o DIR {step['example']}".rstrip(),
            style="dim",
        ),
        soft_wrap=True,
    )


def one_line(value: Any) -> str:
    """A text, or a pair of texts, without line breaks and tabs."""
    parts = [value] if isinstance(value, str) else value
    return " | ".join(" ".join(part.split()) for part in parts)
