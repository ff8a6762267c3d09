"""Plans: chosen knobs, predicted memory, and a folder that is written completely or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from translution.planner.common.errors import DoesNotFitError, InputError
from translution.planner.common.machine import usable_cores
from translution.planner.common.units import format_bytes, format_count, format_flops
from translution.planner.config.loading import load_model, preset
from translution.planner.config.model import override
from translution.planner.config.run_config import RunConfig
from translution.planner.config.training import TrainingSpec
from translution.planner.costs.parameters import ParameterGroup, parameter_groups
from translution.planner.hardware.cluster import ClusterSpec, load_cluster
from translution.planner.memory.estimate import estimate_memory
from translution.planner.plans.build import make_plan
from translution.planner.plans.defaults import choose_tile, choose_zero
from translution.planner.plans.folder import write_plan_folder
from translution.planner.plans.plan import Plan, load_plan
from translution.planner.simulator.engine.coordinator import partitioned_numel


@pytest.fixture
def plan(root: Path) -> Plan:
    spec = load_model(str(root / "examples" / "digits.yaml"))
    return make_plan(spec, load_cluster("cpu:1"), TrainingSpec())


def gpus(ranks: int, gibibytes: int = 80) -> ClusterSpec:
    return ClusterSpec(ranks_per_node=ranks, device_memory_bytes=gibibytes * 2**30)


def test_a_tensor_is_padded_to_a_multiple_of_the_ranks() -> None:
    assert partitioned_numel([ParameterGroup("norms", (5,), 3), ParameterGroup("head", (4, 2))], 4) == 3 * 2 + 2


def test_model_states_of_vit_base_by_hand() -> None:
    """15,608,200,168 parameters in bf16 on 8 ranks; ZeRO-3 stores 2 + 2 + 4 + 8 bytes per parameter of a partition."""
    spec = preset("vit-base/16")
    training = TrainingSpec(precision="bf16", data="synthetic", micro_batch=1)
    tile = choose_tile(spec, 8)
    zero = choose_zero(spec, tile, 3, 8)
    estimate = estimate_memory(RunConfig(spec, gpus(8), training, zero, tile))
    share = partitioned_numel(parameter_groups(spec, tile), 8)
    assert share == pytest.approx(15_608_200_168 / 8, rel=1e-5)
    assert [estimate.of(name) for name in ("parameters", "gradients", "master parameters", "optimizer states")] == [
        2 * share,
        2 * share,
        4 * share,
        8 * share,
    ]
    assert all(peak.bytes == sum(item.bytes for item in peak.breakdown) for peak in estimate.peaks)
    assert estimate.peak_bytes == max(peak.bytes for peak in estimate.peaks if peak.tier == "device")


@pytest.mark.slow
@given(
    ranks=st.sampled_from([1, 2, 4, 8, 16]),
    micro_batch=st.integers(1, 8),
    precision=st.sampled_from(["fp32", "bf16"]),
    stage=st.sampled_from([0, 1, 2, 3]),
    operator=st.sampled_from(["attention", "translution", "alpha"]),
)
def test_memory_falls_with_ranks_and_stage_and_grows_with_the_batch(
    ranks: int, micro_batch: int, precision: Any, stage: Literal[0, 1, 2, 3], operator: str
) -> None:
    spec = override(preset("vit-tiny/56"), operator=operator)

    def resident(ranks: int, stage: Literal[0, 1, 2, 3]) -> int:
        zero = choose_zero(spec, 13, stage, ranks).model_copy(update={"persistence_threshold_elements": 0})
        training = TrainingSpec(precision=precision, micro_batch=micro_batch, data="synthetic")
        estimate = estimate_memory(RunConfig(spec, gpus(ranks), training, zero, 13))
        return sum(estimate.of(name) for name in ("parameters", "master parameters", "optimizer states"))

    assert resident(2 * ranks, stage) <= resident(ranks, stage)
    zero = choose_zero(spec, 13, stage, ranks)
    peaks = [
        estimate_memory(
            RunConfig(
                spec, gpus(ranks), TrainingSpec(precision=precision, micro_batch=batch, data="synthetic"), zero, 13
            )
        ).peak_bytes
        for batch in (micro_batch, micro_batch + 1)
    ]
    assert peaks[0] <= peaks[1]


def test_the_knobs_hold_one_tile_at_a_time() -> None:
    spec = preset("vit-base/16")
    tile = choose_tile(spec, 8)
    assert tile is not None
    zero = choose_zero(spec, tile, 3, 8)
    elements = tile * 768 * 768
    assert elements <= 2**26
    assert elements % 8 == 0
    assert zero.prefetch_bucket_elements == zero.max_reuse_distance_elements == 0
    assert zero.persistence_threshold_elements < elements <= zero.reduce_bucket_elements


def test_the_config_sets_values_that_deepspeed_would_choose_silently(plan: Plan) -> None:
    config = plan.deepspeed_config()
    assert config["gradient_clipping"] == plan.training.gradient_clipping
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["optimizer"]["params"]["weight_decay"] == plan.training.weight_decay
    assert config["optimizer"]["params"]["torch_adam"] is True
    assert config["train_batch_size"] == plan.training.global_batch(plan.cluster.world_size)


def test_adamw_with_8_bit_states_is_passed_as_an_object_and_stays_on_the_device() -> None:
    spec, cluster = preset("vit-base/32"), load_cluster("8xH100")
    training = TrainingSpec(precision="bf16", adam="8bit", data="synthetic", micro_batch=1)
    plan = make_plan(spec, cluster, training)
    config = plan.deepspeed_config()
    assert "optimizer" not in config
    assert config["zero_allow_untested_optimizer"] is True
    whole = make_plan(spec, cluster, training.model_copy(update={"adam": "fused"}))
    states = [each.prediction.of("optimizer states") for each in (plan, whole)]
    # A byte per element and moment, and 4 bytes for 256 of them, instead of 4 bytes.
    assert states[0] / states[1] == pytest.approx((1 + 4 / 256) / 4, rel=1e-3)
    with pytest.raises(InputError, match=r"adam: '8bit' is not allowed: .* with optimizer offload"):
        make_plan(spec, cluster, training, offload="cpu-optimizer")
    with pytest.raises(ValueError, match=r"adam: '8bit' is not allowed: .* with bf16_states"):
        TrainingSpec(precision="bf16", bf16_master=True, bf16_states=True, adam="8bit")


def test_the_folder_holds_the_plan_and_its_files(plan: Plan, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "plan"
    write_plan_folder(plan, target)
    assert sorted(path.name for path in target.iterdir()) == [
        "README.md", "accelerate.yaml", "ds_config.json", "ds_config_hf.json", "environment.sh", "job.sbatch",
        "jobset.yaml", "launch-torchrun.sh", "launch.sh", "plan.json", "skypilot.yaml",
    ]  # fmt: skip
    assert load_plan(target) == plan
    assert json.loads((target / "ds_config.json").read_text()) == plan.deepspeed_config()
    assert str(plan.prediction.peak_bytes) in (target / "README.md").read_text()
    assert os.access(target / "launch.sh", os.X_OK)
    subprocess.run(["sh", "-n", str(target / "launch.sh")], check=True)
    assert [path.name for path in target.parent.iterdir()] == ["plan"]


@pytest.mark.parametrize("script", ["launch.sh", "launch-ssh.sh", "launch-torchrun.sh", "job.sbatch"])
def test_scripts_find_their_folder_where_cdpath_is_exported(script: str, plan: Plan, tmp_path: Path) -> None:
    # With CDPATH, cd prints the folder that it finds, and may prefer another one of the same name.
    cluster = plan.cluster.model_copy(update={"nodes": 2})
    folder, other = tmp_path / "my plans" / "small one", tmp_path / "other" / "small one"
    write_plan_folder(plan.model_copy(update={"cluster": cluster}), folder)
    other.mkdir(parents=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("translution", "torchrun", "srun", "scontrol"):
        (programs / name).write_text('#!/bin/sh\nfor word; do echo "<$word>" >> "$SEEN"; done\n')
        (programs / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
        "CDPATH": f"{other.parent}:{folder.parent}", "SEEN": str(tmp_path / "seen"), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]", "NODE_RANK": "0", "MASTER_ADDR": "node1",
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
    }  # fmt: skip
    shell = "bash" if script == "job.sbatch" else "sh"
    subprocess.run([shell, f"{folder.name}/{script}", "runs/own"], check=True, cwd=folder.parent, env=environment)
    words = (tmp_path / "seen").read_text()
    assert f"<{folder}>\n" in words
    assert str(other) not in words
    assert f"{folder}\n{folder}" not in words


def test_an_existing_folder_is_replaced_only_with_force(plan: Plan, tmp_path: Path) -> None:
    target = tmp_path / "plan"
    write_plan_folder(plan, target)
    (target / "runs" / "001").mkdir(parents=True)
    (target / "runs" / "001" / "metrics.jsonl").write_text("{}")
    with pytest.raises(InputError, match="exists already"):
        write_plan_folder(plan, target)
    write_plan_folder(plan, target, force=True)
    assert (target / "runs" / "001" / "metrics.jsonl").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_a_failed_replacement_loses_no_run(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "plan"
    write_plan_folder(plan, target)
    checkpoint = target / "runs" / "001" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("days of work")

    def refuse(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    for name in ("replace", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, refuse)
            with contextlib.suppress(InputError):
                write_plan_folder(plan, target, force=True)
        assert (checkpoint / "weights").exists()
        assert load_plan(target) == plan
    monkeypatch.chdir(target)
    write_plan_folder(plan, Path(), force=True)
    assert (checkpoint / "weights").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_force_replaces_only_a_plan_folder(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"--force replaces only a folder that holds plan\.json"):
        write_plan_folder(plan, tmp_path, force=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_failed_write_leaves_nothing(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("translution.planner.plans.folder.folder_readme", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_plan_folder(plan, tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data.update(schema_version=3, new=1),
            "schema_version: 3 is not allowed: must be 2: a newer translution-scale made this plan",
        ),
        (lambda data: data.update(schema_version="x"), "schema_version: 'x' is not allowed"),
        (lambda data: data.pop("model"), "model: is required"),
        (lambda data: data["training"].update(steps=0), "training.steps: 0 is not allowed"),
        (lambda data: data.update(extra=1), "unknown key 'extra'"),
    ],
)
def test_a_damaged_plan_gives_a_one_line_error(plan: Plan, tmp_path: Path, change: Any, message: str) -> None:
    write_plan_folder(plan, tmp_path / "plan")
    path = tmp_path / "plan" / "plan.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        load_plan(tmp_path / "plan")


def test_a_truncated_plan_gives_a_one_line_error(plan: Plan, tmp_path: Path) -> None:
    write_plan_folder(plan, tmp_path / "plan")
    path = tmp_path / "plan" / "plan.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match="not valid JSON"):
        load_plan(tmp_path / "plan")


def test_the_error_for_a_plan_that_does_not_fit_names_its_size() -> None:
    training = TrainingSpec(data="synthetic", precision="bf16", micro_batch=1)
    with pytest.raises(DoesNotFitError, match=r"needs .* GiB per rank, .* a rank has 79.65 GiB") as caught:
        make_plan(preset("vit-large/16"), load_cluster("8xH100"), training)
    assert caught.value.exit_code == 3
    assert make_plan(preset("vit-large/16"), load_cluster("8x8xH100"), training).prediction.peak_bytes < 80 * 2**30


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"cpu:{usable_cores() + 1}", "ranks must be from 1 to"),
        ("cpu:0", "ranks must be from 1 to"),
        ("8xH1000", r"GPU 'H1000' is not allowed: .*did you mean 'H100'"),
        ("lots", "cluster: 'lots' is not allowed"),
        ("0xH100", "ranks_per_node: 0 is not allowed"),
        ("nowhere.yaml", "no such file"),
    ],
)
def test_a_bad_cluster_gives_a_one_line_error(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_cluster(name)


def test_a_cluster_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("name: lab\nnodes: 3\nranks_per_node: 4\ndevice_memory_bytes: 51539607552\n")
    assert load_cluster(str(path)).world_size == 12
    path.write_text("nodes: 3\nranks: 4\n")
    with pytest.raises(InputError, match=r"cluster.yaml: .*(unknown key 'ranks'|is required)"):
        load_cluster(str(path))


def test_data_must_match_the_model() -> None:
    with pytest.raises(InputError, match="data: 'digits' is not allowed"):
        make_plan(preset("gpt-tiny/160"), load_cluster("8xH100"), TrainingSpec())


def test_the_error_for_a_global_batch_above_the_data_names_both(root: Path) -> None:
    spec = load_model(str(root / "examples" / "digits.yaml"))
    with pytest.raises(InputError, match=r"global batch: 2000 .* must be at most 1433"):
        make_plan(spec, load_cluster("cpu:1"), TrainingSpec(micro_batch=2000))


def test_the_error_for_a_tile_out_of_range_names_it() -> None:
    with pytest.raises(InputError, match="tile_relations: 99 is not allowed: must be from 1 to 52"):
        make_plan(preset("vit-tiny/56"), load_cluster("8xH100"), TrainingSpec(), tile_relations=99)


def test_binary_and_decimal_units_differ() -> None:
    assert (format_bytes(2**30), format_bytes(10**9), format_bytes(512)) == ("1.00 GiB", "954 MiB", "512 B")
    assert (format_count(15_608_200_168), format_count(999)) == ("15.61 G", "999")
    assert format_flops(1_400_000_000_000) == "1.40 TFLOP"
