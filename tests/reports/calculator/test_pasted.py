"""Texts that users paste are read safely, within limits, and refused in one line."""

from __future__ import annotations

import itertools
import time

import pytest

from translution.planner.common import InputError
from translution.reports.calculator.pasted import MAX_PASTED, pasted_cluster, pasted_model, spec_file

BOMB = "a: &a [1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * [f'*{before}'])}]\n" for before, name in itertools.pairwise("abcdefghi")
)
MODEL = "family: vit\ndim: 96\ndepth: 2\nheads: 3\nimage: 64\npatch: 16\nclasses: 10\n"


def test_a_text_describes_a_model_and_a_cluster() -> None:
    spec = pasted_model(MODEL)
    assert (spec.dim, spec.depth, spec.tokens) == (96, 2, 17)
    assert (
        pasted_model('{"family": "gpt", "dim": 8, "depth": 1, "heads": 1, "context": 4, "vocabulary": 9}').tokens == 4
    )
    cluster = pasted_cluster("base: 2x8xH100\nhost_memory_bytes: 1000000000000\nname: ours\n")
    assert (cluster.world_size, cluster.host_memory_bytes, cluster.name) == (16, 10**12, "ours")


def test_the_file_of_a_spec_reads_back_and_no_line_ends_a_shell_document() -> None:
    spec = pasted_model(MODEL + "name: 'END'\n")
    assert pasted_model(spec_file(spec)) == spec
    cluster = pasted_cluster("base: 4xdgx-h100\nprice_per_gpu_hour: 2\ngpu_constants: {nccl: 1000}")
    assert pasted_cluster(spec_file(cluster)) == cluster
    for line in (spec_file(spec) + spec_file(cluster)).splitlines():
        assert line[0] in " {}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "NoneType is not allowed: must be lines of the form key: value"),
        ("- 1", "list is not allowed"),
        ("family: bert", "family: 'bert' is not allowed: must be vit, gpt or video"),
        (MODEL + "dpeth: 3", "unknown key 'dpeth'"),
        (MODEL.replace("heads: 3", "heads: 5"), "heads: 5 is not allowed: must divide dim 96"),
        (MODEL.replace("depth: 2", "depth: 1000"), "depth: 1,000 is not allowed: must be at most 128"),
        (MODEL.replace("dim: 96", "dim: 99999"), "dim: 99,999 is not allowed: must be at most 16,384"),
        (MODEL.replace("heads: 3", "heads: 192\ndim: 192").replace("dim: 96\n", ""), "heads: 192 is not allowed"),
        ("family: vit\ndim: [", "not valid YAML"),
        ("family: !!python/object/apply:os.system ['true']", "not valid YAML"),
        (BOMB, "more than 100,000 values"),
        ("[" * (MAX_PASTED - 1), "not valid YAML"),
        ("name: \"\\e[2J\"\n" + MODEL, "must be one line without control characters"),
    ],
)  # fmt: skip
def test_a_bad_model_is_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        pasted_model(text)
    assert str(caught.value).startswith("model_yaml: ")
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: 8xH1000", "did you mean"),
        ("base: /etc/passwd", "is not allowed"),
        ("base: other.yaml", "base: 'other.yaml' is not allowed: must be the name of a cluster"),
        ("base: cpu:2", "device: cpu is not allowed: must be a cluster of GPUs"),
        ("base: CPU:9999", "device: cpu is not allowed"),
        ("device: cpu\nranks_per_node: 2\ndevice_memory_bytes: 1", "device: cpu is not allowed"),
        ("base: 2000x8xH100", "nodes: 2,000 is not allowed: must be at most 1,024"),
        ("base: 8xH100\nranks_per_node: 64", "ranks_per_node: 64 is not allowed: must be at most 16"),
        ("base: 8xH100\ndevice_memory_bytes: 80", "device_memory_bytes: 80 is not allowed: must be at least"),
        ("base: 8xH100\nnvme_bytes: 1", "nvme_bytes: 1 is not allowed: must be at least"),
        ("base: 8xH100\nhost_memory: 5", "unknown key 'host_memory'"),
    ],
)
def test_a_bad_cluster_is_one_line_and_tells_nothing_about_the_server(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        pasted_cluster(text)
    assert str(caught.value).startswith("cluster_yaml: ")
    assert message in str(caught.value)
    assert "cores of this machine" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("context", [1, 2**20])
def test_a_huge_model_is_read_at_once(context: int) -> None:
    began = time.process_time()
    text = f"family: gpt\ndim: 64\ndepth: 128\nheads: 1\ncontext: {context}\nvocabulary: {2**20}\nwindow: 3"
    assert pasted_model(text).tokens == context
    assert time.process_time() - began < 5
