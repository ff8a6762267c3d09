"""Bad inputs by command: each is answered in one line that names the field and the value."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import indent

import pytest
from helpers.runs import write_plan

from translution.cli.main import run

NUMBERS = ("x", "1.5", "nan", "")
WORDS = ("nothing", "", "Über")
HUGE = "9" * 40

PLAN: dict[str, tuple[str, ...]] = {
    "--cluster": ("8x", "x8xH100", "8xH1000", "8xV100", "cpu:0", "cpu:-1", "cpu:x", "0x8xH100", "none.yaml", "dgx",
        "", "8×H100"),
    "--precision": ("fp8", "BF16", "32", *WORDS),
    "--global-batch": ("0", "-8", "7", HUGE, *NUMBERS),
    "--micro-batch": ("0", "-1", "3", *NUMBERS),
    "--accumulation": ("0", "-4", "5", *NUMBERS),
    "--steps": ("0", "-1", HUGE, *NUMBERS),
    "--samples": ("0", "-7", *NUMBERS),
    "--epochs": ("0", "-1", "nan", "inf", "x"),
    "--warmup-steps": ("-1", "100", HUGE, *NUMBERS),
    "--learning-rate": ("0", "-1", "nan", "inf", "x"),
    "--weight-decay": ("-1", "nan", "inf", "x"),
    "--gradient-clipping": ("-1", "nan", "inf", "x"),
    "--seed": ("-1", HUGE, *NUMBERS),
    "--stage": ("4", "-1", *NUMBERS),
    "--tile-relations": ("0", "-3", "100000", *NUMBERS),
    "--offload": ("gpu", "CPU", "nvme ", *WORDS),
    "--offload-ratio": ("0", "1.5", "-0.1", "nan", "half"),
    "--checkpointing": ("all", "Block", *WORDS),
    "--minimize": ("speed", "Time", *WORDS),
    "--headroom": ("1", "-0.1", "nan", "inf", "x"),
    "--data": ("imagenet", "images", "tokens", "stdlib", "digits-moving", *WORDS),
    "--recipe": ("translution", "translution-gpt", *WORDS),
    "--operator": ("conv", "Translution", *WORDS),
    "--roles": ("qq", "x", "qkvo", ""),
    "--c1": ("0", "-1", "x", "4"),
    "--c2": ("0", "-1", "x", "4"),
    "--relative-layers": ("first:0", "first:99", "some", "every:x", ""),
    "--set": ("dim", "=3", "dim=0", "dim=3.5", "depth=[]", "nothing=1", "image=7", "name=", "heads=5", "c1=4",
        "dpeth=3"),
    "--train": ("optimizer=adam", "betas=1", "micro=2", "momentum=2", "bf16_states=true", "steps=-1", "seed=x",
        "loss=chunked"),
    "--zero": ("stage=7", "stage=2", "bucket=1", "sub_group_elements=0", "offload_optimizer.device=cpu", "x.y=1",
        "stage"),
}  # fmt: skip
"""Values of an option of `plan` that are all wrong for a small vision transformer on 8 H100s."""

TOGETHER: tuple[tuple[str, tuple[str, str]], ...] = (
    ("--steps 5 --samples 100", ("steps", "samples")),
    ("--steps 5 --epochs 2", ("steps", "epochs")),
    ("--epochs 2", ("epochs", "samples")),
    ("--samples 100 --train steps=5", ("steps", "samples")),
    ("--steps 5 --train steps=6", ("--steps", "--train steps")),
    ("--seed 5 --train seed=6", ("--seed", "--train seed")),
    ("--data synthetic --train data=digits", ("--data", "--train data")),
    ("--precision bf16 --train precision=fp32", ("--precision", "--train precision")),
    ("--micro-batch 2 --train micro_batch=4", ("--micro-batch", "--train micro_batch")),
    ("--train steps=5 --train steps=6", ("--train steps", "6")),
    ("--train accumulation=2 --train gradient_accumulation_steps=4", ("gradient_accumulation_steps", "4")),
    ("--zero overlap_comm=true --zero overlap_comm=false", ("--zero overlap_comm", "False")),
    ("--set dim=192 --set dim=384", ("--set dim", "384")),
    ("--operator alpha --set operator=attention", ("--operator", "--set operator")),
    ("--checkpointing none --set checkpointing=block", ("--checkpointing", "--set checkpointing")),
    ("--operator attention --roles q", ("operator", "roles")),
    ("--operator attention --relative-layers first:2", ("operator", "relative_layers")),
    ("--operator shaw --c2 4", ("operator", "c2")),
    ("--operator attention --tile-relations 2", ("tile_relations", "2")),
    ("--offload none --offload-ratio 0.5", ("offload", "offload_ratio")),
    ("--offload cpu --offload-ratio 0.5", ("offload", "offload_ratio")),
    ("--stage 0 --offload cpu", ("stage", "offload")),
    ("--stage 2 --offload nvme --nvme-path /x", ("stage", "offload")),
    ("--stage 2 --offload-ratio 0.5", ("stage", "offload_ratio")),
    ("--offload nvme", ("offload", "nvme_path")),
    ("--offload cpu --nvme-path /x", ("offload", "nvme_path")),
    ("--stage 1 --nvme-path /x", ("stage", "nvme_path")),
    ("--stage 2 --quantized", ("stage", "quantized")),
    ("--all-nodes --minimize nodes", ("all_nodes", "minimize")),
    ("--zero offload_param.device=cpu --offload none", ("offload_param.device", "offload")),
    ("--train torch_autocast=bf16 --precision bf16", ("torch_autocast", "precision")),
    ("--train lr_schedule=cosine-epoch", ("epoch_steps", "lr_schedule")),
)  # fmt: skip
"""Options of `plan` that contradict one another, and what the line names."""

ESTIMATE: dict[str, tuple[str, ...]] = {
    "MODEL": ("", "vit", "vit-huge/16", "vit-base/15", "gpt-base/0", "nothing.yaml", "vit-base/16/4", "../x",
        "9" * 3000),
    "--ranks": ("0", "-1", HUGE, *NUMBERS),
    "--micro-batch": ("0", "-1", HUGE, *NUMBERS),
    "--precision": ("fp8", *WORDS),
    "--operator": ("conv", *WORDS),
    "--set": ("window=x", "patch=[1]", "classes=0", "dropout=1", "ffn=relu", "norm=batch", "kv_heads=2", "rotary=x"),
}  # fmt: skip
COMPARE: dict[str, tuple[str, ...]] = {
    "MODEL": ("", "vit", "nothing.json", "vit-base/15"),
    "--gpu": ("H10", "V100", *WORDS),
    "--precision": ("fp8", *WORDS),
    "--alpha-rank": ("0", "-1", *NUMBERS),
    "--out": ("a.txt", "none/a.md", "a"),
}
LAUNCH: dict[str, tuple[str, ...]] = {
    "--master-port": ("0", "-1", "65536", HUGE, *NUMBERS),
    "--ssh-port": ("0", "-1", "65536", "22", *NUMBERS),
    "--master-addr": ("a b", "1.2.3", "999.1.1.1", "12", "-x.y", "host", "a" * 300),
    "--node-rank": ("0", "1", *NUMBERS),
    "--hang-minutes": ("-1", "nan", "x"),
    "--from": ("nothing.safetensors",),
    "--hostfile": ("nothing",),
}
OTHERS: tuple[str, ...] = (
    "launch nothing", "status nothing", "verify nothing", "export nothing --out a.safetensors", "preflight nothing",
    "verify-checkpoint nothing", "rehearse nothing", "report nothing --out a.html", "launch PLAN --no-verify",
    "launch PLAN --check-swap --dry-run", "launch PLAN --no-ssh", "status PLAN", "verify PLAN",
        "export PLAN --out x.safetensors",
    "calibrate --cluster cpu:1 --out a.txt", "calibrate --cluster 8xH100 --out a.yaml",
        "calibrate --cluster x --out a.yaml",
    "measure PLAN --stage 2", "measure PLAN --train steps=3", "measure PLAN --set depth=2",
        "measure vit-tiny/56 --offload nvme",
    "measure vit-tiny/56 --offload-ratio 0.5", "measure vit-tiny/56 --precision fp16", "measure nothing.yaml",
    "experiment nothing", "experiment shift --seeds 0", "experiment shift --steps x", "prepare nothing.txt --out a",
    "import nothing.pth --out a.safetensors", "report --out a.html", "report PLAN --out a.txt",
        "report PLAN --out none/a.html",
    "serve --port 70000", "serve --workers 0", "clusters --nothing", "nothing", "estimate", "plan",
        "plan vit-tiny/56",
)  # fmt: skip

SPEC = "family: vit\ndim: 64\ndepth: 2\nheads: 2\nimage: 16\npatch: 4\nclasses: 10\n"
MODEL_FILES: tuple[tuple[str, str | bytes, str], ...] = (
    ("empty.yaml", "", "holds nothing"),
    ("null.yaml", "null\n", "holds nothing"),
    ("list.yaml", "- a\n- b\n", "holds a list"),
    ("text.yaml", "just text\n", "holds a text"),
    ("number.json", "3", "holds a number"),
    ("empty.json", "", "not valid JSON"),
    ("cut.json", '{"family": "vit",', "not valid JSON"),
    ("nan.json", '{"family": "vit", "dim": NaN}', "dim"),
    ("latin.yaml", "name: Größe\n".encode("latin-1"), "UTF-8"),
    ("wide.yaml", SPEC.encode("utf-16"), "UTF-8"),
    ("binary.yaml", bytes(range(256)), "UTF-8"),
    ("tab.yaml", "family:\tvit\n\tdim: 3\n", "not valid YAML"),
    ("two.yaml", f"{SPEC}---\n{SPEC}", "not valid YAML"),
    ("alias.yaml", "a: &a [1]\nb: *c\n", "not valid YAML"),
    ("object.yaml", "!!python/object:os.system {}\n", "not valid YAML"),
    ("twice.yaml", f"{SPEC}dim: 32\n", "dim"),
    ("below.yaml", "model:\n" + indent(SPEC, "  "), "family: is required"),
    ("family.yaml", SPEC.replace("vit", "vti"), "vti"),
    ("none.yaml", SPEC.replace("family: vit\n", ""), "family: is required"),
    ("typo.yaml", SPEC.replace("depth", "layers"), "layers"),
    ("near.yaml", SPEC.replace("depth", "dpeth"), "did you mean 'depth'"),
    ("unit.yaml", SPEC.replace("dim: 64", "dim: 64px"), "dim"),
    ("date.yaml", SPEC.replace("dim: 64", "dim: 2020-01-01"), "dim"),
    ("truth.yaml", SPEC.replace("depth: 2", "depth: yes"), "depth"),
    ("half.yaml", SPEC.replace("depth: 2", "depth: 2.5"), "depth"),
    ("huge.yaml", SPEC.replace("depth: 2", "depth: 1e9"), "depth"),
    ("minus.yaml", SPEC.replace("classes: 10", "classes: -10"), "classes"),
    ("number.yaml", f"{SPEC}3: 4\n", "3"),
    ("short.safetensors", b"", "safetensors"),
)
"""Model files, and what the line says besides their names; all are tried with `estimate`."""
CLUSTER_FILES: tuple[tuple[str, str | bytes, str], ...] = (
    ("empty.yaml", "", "holds nothing"),
    ("list.yaml", "- base: 8xH100\n", "holds a list"),
    ("base.yaml", "base: 8xH101\n", "H101"),
    ("near.yaml", "base: 8xH100\nhost_memory: 1TiB\n", "did you mean 'host_memory_bytes'"),
    ("unit.yaml", "base: 8xH100\nhost_memory_bytes: 2 potatoes\n", "host_memory_bytes"),
    ("rate.yaml", "base: 8xH100\nhost_memory_bytes: 80GB/s\n", "host_memory_bytes"),
    ("bits.yaml", "base: 8xH100\nnic_bytes_per_s: 200Gb/s\n", "nic_bytes_per_s: '200Gb/s'"),
    ("minus.yaml", "base: 8xH100\nhost_memory_bytes: -1\n", "host_memory_bytes"),
    ("zero.yaml", "base: 8xH100\nnodes: 0\n", "nodes"),
    ("word.yaml", "base: 8xH100\nnodes: two\n", "nodes"),
    ("price.yaml", "base: 8xH100\nprice_per_gpu_hour: -2\n", "price_per_gpu_hour"),
    ("money.yaml", "base: 8xH100\nprice_per_gpu_hour: 2 EUR\n", "price_per_gpu_hour"),
)
"""Cluster files, and what the line says besides their names; all are tried with `plan`."""
HOSTFILES: tuple[tuple[str, str | bytes, str], ...] = (
    ("empty", "", "hostfile"),
    ("bare", "node1\n", "node1"),
    ("twice", "localhost slots=1\nlocalhost slots=1\n", "localhost"),
    ("minus", "localhost slots=-1\n", "slots=-1"),
    ("word", "localhost slots=one\n", "slots=one"),
    ("many", "localhost slots=4\n", "hostfile"),
    ("latin", "nöde slots=1\n".encode("latin-1"), "hostfile"),
)
"""Hostfiles of a plan with one rank, and what the line says."""
PLACES: tuple[tuple[str, str], ...] = (
    ("estimate FOLDER", "FOLDER"), ("estimate FOLDER.yaml", "FOLDER.yaml"),
    ("estimate FOLDER.safetensors", "FOLDER.safetensors"), ("estimate LOOP.yaml", "LOOP.yaml"),
    ("plan vit-tiny/56 --cluster FOLDER", "FOLDER"), ("plan vit-tiny/56 --cluster 8xH100 --out FILE", "FILE"),
    ("plan vit-tiny/56 --cluster 8xH100 --out FILE/x", "FILE"),
    ("plan vit-tiny/56 --cluster 8xH100 --out PLAN", "PLAN"),
    ("plan vit-tiny/56 --cluster 8xH100 --out FOLDER", "FOLDER"),
    ("launch FOLDER", "plan.json"), ("launch FILE", "FILE"), ("launch PLAN --hostfile FOLDER", "FOLDER"),
    ("launch PLAN --run FILE", "FILE"), ("status FILE", "FILE"), ("verify FILE", "FILE"),
    ("verify-checkpoint FILE", "FILE"), ("export FILE --out x.safetensors", "FILE"), ("preflight FILE", "FILE"),
    ("import FOLDER --out x.safetensors", "FOLDER: must be a file"), ("import EMPTY --out x.safetensors", "EMPTY"),
    ("import FILE --out x.safetensors", "torch.save"), ("rehearse FILE", "FILE"),
    ("report FILE --out a.html", "FILE"), ("report PLAN --out FOLDER.html", "FOLDER.html"),
    ("report --accuracy FOLDER --out a.html", "FOLDER"), ("report --accuracy FILE.json --out a.html", "FILE.json"),
    ("report --public FILE.json --out a.html", "FILE.json"), ("report --gpu nothing --out a.html", "nothing"),
    ("report --experiments FOLDER --out a.html", "FOLDER"), ("report --benchmarks FOLDER --out a.html", "FOLDER"),
    ("report --model vit-basee/16 --out a.html", "did you mean 'vit-base/16'"),
    ("compare vit-tiny/56 --gpu 8xH100", "gpu: GPU '8xH100'"),
    ("compare vit-tiny/56 --out FOLDER.json", "FOLDER.json"),
    ("compare vit-basee/16", "did you mean 'vit-base/16'"),
    ("calibrate --cluster cpu:1 --out FOLDER.yaml", "FOLDER.yaml"),
    ("calibrate --cluster cpu:1 --out MINE.yaml", "--force"), ("calibrate --cluster cpu:1 --out none/a.yaml", "none"),
    ("calibrate --cluster 8xH100 --out a.yaml", "cluster: 8 GPUs"), ("experiment shifts", "did you mean 'shift'"),
    ("experiment shift --out FILE", "FILE"), ("prepare EMPTY --out d", "0 tokens"),
    ("prepare FOLDER --out d", "FOLDER"),
    ("prepare a.tar --out d", "a.tar"), ("serve --host nowhere.invalid --port 0", "nowhere.invalid"),
    ("estimte vit-tiny/56", "estimate"), ("estimate vit-tiny/56 --precison fp32", "--precision"),
    ("launch PLAN --reusme", "--resume"), ("--verison", "--version"),
)  # fmt: skip
"""Paths that are of another kind than a command needs, names with a letter wrong, and what the line says."""


def pairs(options: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(option, value) for option, values in options.items() for value in values]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused, and return its line."""
    assert run(arguments) == 2, arguments
    captured = capsys.readouterr()
    assert captured.out == ""
    # What takes more than two seconds, as on a busy machine, says how far it is; a plan may be for another torch.
    *progress, line = captured.err.splitlines()
    assert all(re.match(r"\w+: \d+%, |note: torch \S+ is installed; ", text) for text in progress)
    assert line.startswith("translution: error: ")
    assert line.isprintable()
    assert len(line) < 1000
    return f"{line}\n"


def named(line: str, option: str, value: str) -> None:
    """Check that a line names an option, or the field that it sets, and the value."""
    name = value.partition("=")[0] if option in ("--set", "--train", "--zero") else option
    field = name.strip("-").rpartition(".")[2].replace("-", "_")
    elsewhere = option == "MODEL" or "FIELD=VALUE" in line or "no such file" in line or "global_batch" in line
    assert elsewhere or field in line.replace("-", "_").lower(), line
    shown = value.partition("=")[2] or value
    shown = value.partition("x")[2] or value if option == "--cluster" else shown
    elsewhere |= any(text in line for text in ("unknown key", "gives it", "is required"))
    assert elsewhere or shown[:30].lower() in line.lower(), line


@pytest.mark.parametrize(("option", "value"), pairs(PLAN))
def test_plan(option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = {"--cluster": "8xH100", "--out": str(tmp_path / "plan")}
    right |= {"--samples": "1000"} if option == "--epochs" else {}
    right |= {"--global-batch": "64"} if option in ("--micro-batch", "--accumulation") else {}
    words = [word for pair in (right | {option: value}).items() for word in pair]
    named(refused(["plan", "vit-tiny/56", *words], capsys), option, value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "names"), TOGETHER)
def test_plan_with_contradictions(
    options: str, names: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "vit-tiny/56", "--cluster", "8xH100", "--out", str(tmp_path / "plan"), *options.split()]
    line = refused(words, capsys)
    assert all(name in line for name in names), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["estimate", "compare"])
def test_estimate_and_compare(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for option, value in pairs(ESTIMATE if command == "estimate" else COMPARE):
        words = [value] if option == "MODEL" else ["vit-tiny/56", option, value]
        named(refused([command, *words], capsys), option, value)
    assert list(tmp_path.iterdir()) == []


def test_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    folder = str(write_plan(tmp_path / "plan", 1, data="synthetic"))
    for option, value in pairs(LAUNCH):
        line = refused(["launch", folder, "--dry-run", option, value], capsys)
        if option not in ("--from", "--hostfile"):
            named(line, option, value)
    assert not (tmp_path / "plan" / "runs").exists()


@pytest.mark.parametrize("words", OTHERS)
def test_other_commands(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "PLAN" in words:
        write_plan(tmp_path / "PLAN", 1, data="synthetic")
    before = sorted(tmp_path.rglob("*"))
    refused(words.split(), capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_files_of_models_and_clusters(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = (("estimate", MODEL_FILES), ("plan vit-tiny/56 --out plan --cluster", CLUSTER_FILES))
    for command, files in commands:
        for name, content, said in files:
            write(place / name, content)
            line = refused([*command.split(), name], capsys)
            assert said in line and (name in line or "cluster: " in line), line
            (place / name).unlink()
    assert list(place.iterdir()) == []


def test_hostfiles(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = str(write_plan(place / "plan", 1, data="synthetic"))
    for name, content, said in HOSTFILES:
        write(place / name, content)
        line = refused(["launch", plan, "--dry-run", "--hostfile", name], capsys)
        assert said in line, line
    assert not (place / "plan" / "runs").exists()


def test_places_and_names(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan(place / "PLAN", 1, data="synthetic")
    for name in ("FOLDER", "FOLDER.yaml", "FOLDER.safetensors", "FOLDER.json", "FOLDER.html"):
        (place / name).mkdir()
    for name, content in (
        ("FILE", "x"),
        ("FILE.json", "{}"),
        ("EMPTY", ""),
        ("a.tar", "x"),
        ("MINE.yaml", "base: cpu:1"),
    ):
        write(place / name, content)
    (place / "LOOP.yaml").symlink_to("LOOP.yaml")
    before = sorted(place.rglob("*"))
    for words, said in PLACES:
        line = refused(words.split(), capsys)
        assert said in line, line
        assert sorted(place.rglob("*")) == before, words
    assert (place / "MINE.yaml").read_text() == "base: cpu:1"


def test_there_are_four_hundred() -> None:
    tables = sum(len(pairs(table)) for table in (PLAN, ESTIMATE, COMPARE, LAUNCH))
    files = len(MODEL_FILES) + len(CLUSTER_FILES) + len(HOSTFILES) + len(PLACES)
    assert tables + len(TOGETHER) + len(OTHERS) + files >= 400
