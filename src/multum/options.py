"""What the commands take, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, Hub id, or example:NAME.")]
Data = Annotated[
    str, typer.Option("--data", metavar="D", help="csv, jsonl, parquet, folder of splits, hf:owner/name or example:NAME.")
]
Unlabelled = Annotated[
    str,
    typer.Option(
        "--unlabelled", metavar="FILE", help="Texts for a teacher to label: .txt, one a line, or csv, tsv, jsonl, parquet."
    ),
]
StepData = Annotated[
    str,
    typer.Option("--data", metavar="D", help="As for shrink; not for steps that look at weights alone."),
]
TaskOptions = Annotated[
    str, typer.Option("--options", metavar="A=B,...", help="Of the task: packed=false (language models), beams=4 (translation).")
]
OptionalData = Annotated[
    str, typer.Option("--data", metavar="D", help="As for shrink; by default that of the shrink or recipe it came from.")
]
TaskName = Annotated[str, typer.Option("--task", metavar="T", help="As Hugging Face pipelines name it: text-classification.")]
OptionalTask = Annotated[str, typer.Option("--task", metavar="T", help="By default the task the model was made for.")]
Columns = Annotated[
    str, typer.Option("--columns", metavar="A=B,...", help="The data's names for the task's columns: text=review,label=stars.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of splits, training and sampling.")]
OptionalSeed = Annotated[int | None, typer.Option("--seed", min=0, help="Of the splits, where the data has none of its own.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads to measure with; by default OMP_NUM_THREADS or all cores."),
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for programs.")]
MaxDrop = Annotated[
    str, typer.Option(metavar="POINTS", help="Points of the task's metric that may be lost; per cent of perplexity.")
]
MaxLatency = Annotated[str | None, typer.Option(metavar="5ms", help="Median time of one text, on this machine.")]
MaxSize = Annotated[str | None, typer.Option(metavar="20MB", help="All files needed to run it.")]
Version = Annotated[bool, typer.Option("--version", is_eager=True, help="Show the version.")]
MinSpeedup = Annotated[str | None, typer.Option(metavar="4", help="Times faster than the original in torch.")]
TimeLimit = Annotated[str | None, typer.Option(metavar="30m", help="No rung after the first is begun that would end later.")]
Quick = Annotated[bool, typer.Option("--quick", help="Train and measure less.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file with model, task, data and steps.")]
OtherModel = Annotated[str, typer.Option("--model", metavar="MODEL", help="Takes the place of the recipe's model.")]
OtherData = Annotated[str, typer.Option("--data", metavar="D", help="Takes the place of the recipe's data.")]
OtherUnlabelled = Annotated[
    str, typer.Option("--unlabelled", metavar="FILE", help="As for shrink; takes the place of the recipe's unlabelled texts.")
]
StepName = Annotated[str, typer.Argument(metavar="STEP", help="As 'multum steps' lists them.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Model folder.")]
Folders = Annotated[list[Path], typer.Argument(metavar="DIR...", help="Model or export folders, compared with the first of them.")]
Split = Annotated[str, typer.Option("--split", metavar="NAME", help="train, validation or test.")]
Rounds = Annotated[int, typer.Option("--rounds", min=3, help="Rounds of timing.")]
Runtime = Annotated[
    str,
    typer.Option(
        "--runtime",
        metavar="R",
        help="pytorch, onnxruntime, openvino, llamacpp; onnxruntime-int8; auto: the fastest, timed here; auto-fp32.",
    ),
]
To = Annotated[
    str,
    typer.Option("--to", metavar="R", help="onnxruntime, openvino or llamacpp (gguf); auto: the fastest, timed here."),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="P",
        help="int8 (the default; of auto any) or fp32, int4 of models that write; of openvino bf16 too; of onnxruntime also "
        "int8-minmax, int8-percentile and int8-mse, whose ranges of activations are taken from training texts; of llamacpp f16, "
        "f32, q4_0, q4_1 (which keeps 4 bits in groups of 32 as they are), q8_0 or q4_k, the last two called int8 and int4 too.",
    ),
]
Lengths = Annotated[
    str, typer.Option("--lengths", metavar="32,128", help="Tokens of a text that auto times with; by default those of the data.")
]
BatchSizes = Annotated[str, typer.Option("--batch-sizes", metavar="1,8", help="Texts at once that auto times with; 1 by default.")]
InputFile = Annotated[
    Path | None,
    typer.Option("--input", metavar="FILE", help="One text a line, or csv, tsv, jsonl, json or parquet with a column 'text'."),
]
Pair = Annotated[list[str] | None, typer.Option("--pair", metavar="TEXT", help="Second text of each, for models of pairs.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
Page = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="By default report.html in the run folder.")]
Pictures = Annotated[
    Path | None, typer.Option("--pictures", metavar="DIR", help="Also write the page's charts as SVG and PNG into this folder.")
]
Name = Annotated[str, typer.Argument(metavar="[NAME]", help="Which one; without it they are listed.")]
OptionalOutput = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to copy it to; by default it stays in the cache.")
]
