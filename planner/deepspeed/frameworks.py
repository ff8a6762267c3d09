"""The DeepSpeed configuration of a plan as Hugging Face's Trainer and Accelerate take it.

The Trainer refuses a configuration whose batch, optimizer or precision is not that of its own arguments, and fills in
the word "auto" instead. Source: transformers 5.24, integrations/deepspeed.py (`trainer_config_process`); accelerate
1.15, commands/config/config_args.py.
"""

from __future__ import annotations

import copy
from typing import Any

import yaml

from ..hardware.cluster import ClusterSpec

TRAINER_CONFIG_FILE, ACCELERATE_FILE = "ds_config_hf.json", "accelerate.yaml"
AUTO = "auto"
_FILLED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer.params.lr",
    "optimizer.params.betas",
    "optimizer.params.eps",
    "optimizer.params.weight_decay",
    "bf16.enabled",
    "fp16.enabled",
)
"""Keys that the Trainer fills in from its arguments; those that a configuration lacks stay out."""


def trainer_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a DeepSpeed configuration with "auto" for every key that the Trainer fills in.

    ZeRO-3 gathers the weights when the Trainer saves the model.

    Args:
        config: the content of ``ds_config.json``.
    """
    result = copy.deepcopy(config)
    for key in _FILLED:
        *sections, leaf = key.split(".")
        section: Any = result
        for name in sections:
            section = section.get(name, {})
        if leaf in section:
            section[leaf] = AUTO
    if result["zero_optimization"]["stage"] == 3:
        # Otherwise the Trainer's model is saved as shards that `from_pretrained` cannot read.
        result["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return result


def accelerate_config(cluster: ClusterSpec, stage: int) -> str:
    """Return the content of ``accelerate.yaml``, for ``accelerate launch`` in the plan folder.

    Args:
        cluster: gives nodes and ranks.
        stage: the plan's ZeRO stage.
    """
    values: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        # On CPU ranks too: with use_cpu Accelerate leaves DeepSpeed out.
        "distributed_type": "DEEPSPEED",
        "use_cpu": False,
        "deepspeed_config": {
            "deepspeed_config_file": "ds_config.json",
            "zero3_init_flag": stage == 3,
            "deepspeed_multinode_launcher": "standard",
        },
        "num_machines": cluster.nodes,
        "num_processes": cluster.world_size,
        "machine_rank": 0,
        "same_network": True,
        "main_training_function": "main",
        "rdzv_backend": "static",
    }
    if cluster.nodes > 1:
        values |= {"main_process_ip": "node1", "main_process_port": 29500}
    notes = "# In this folder, with your script: accelerate launch --config_file accelerate.yaml train.py\n"
    if cluster.nodes > 1:
        notes += "# On every node with its own number: --machine_rank; node1 stands for the first node's name.\n"
    text: str = yaml.safe_dump(values, sort_keys=False)
    return notes + text
