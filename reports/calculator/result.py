"""Costs of a choice and the outcome of its search, as page and JSON show them, and the plan folder as a zip file."""

from __future__ import annotations

import io
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter

from translution.planner.analysis import OPERATOR_LABELS, compare_operators
from translution.planner.common import InputError, Schema, Tier, parse_json, stored_as
from translution.planner.costs import TABLES
from translution.planner.deepspeed import config_warnings
from translution.planner.hardware import ClusterSpec
from translution.planner.memory import BreakdownItem, MemoryEstimate
from translution.planner.plans import PLAN_FILE, Plan, write_plan_folder
from translution.planner.search import (
    Advice,
    KnobReason,
    NoPlanFits,
    ParetoPoint,
    SearchResult,
    StrategyVerdict,
    describe_hybrid,
    search_plan,
)
from translution.planner.simulator.network import DtypeSizes
from translution.planner.timing import RunCost, StepTime

from ..inputs.prediction import tier_name
from .choice import Choice, SearchInput, choice_command, choice_error, search_input

State = Literal["found", "nothing fits", "refused", "stopped", "searching", "busy"]


class OperatorCost(Schema):
    """Exact costs of the model with one operator."""

    operator: str
    label: str
    parameters: int
    in_tables: int
    """Parameters in relation tables."""
    state_bytes: int
    """Bytes of model states over all ranks, for AdamW with an fp32 master copy."""
    saved_bytes: int = stored_as("kept_bytes")
    """Bytes that the forward pass of one sample saves for backward."""
    published_saved_bytes: int = stored_as("published_kept_bytes")
    """The same for the published code, which gathers a matrix for every pair of tokens."""
    training_flops: int
    """FLOPs of one sample, forward and backward."""


class Costs(Schema):
    """Exact costs, which need no search."""

    model: str
    family: str
    tokens: int
    components: dict[str, int]
    """Parameters of the chosen operator by component."""
    operators: tuple[OperatorCost, ...]
    """Costs by operator; the chosen operator is first."""
    command: str
    """Command that makes the same plan."""


class TierUse(Schema):
    """One memory tier of one rank at its peak."""

    tier: Tier
    name: str
    """Display name of the tier."""
    peak_bytes: int
    capacity_bytes: int | None
    """A rank's share of the node's capacity; null if unknown. Pageable and pinned host memory share one capacity."""
    low_bytes: int | None
    high_bytes: int | None
    """Interval of the peak from uncertain GPU constants; for the device only."""
    phase: str
    site: str = stored_as("moment")
    breakdown: tuple[BreakdownItem, ...] = stored_as("entries")


class PlanView(Schema):
    """The chosen plan and the reasons for it."""

    cluster: str
    nodes: int
    ranks: int
    stage: int
    strategy: str = stored_as("family")
    checkpointing: str
    micro_batch: int
    accumulation: int
    global_batch: int
    tile_relations: int | None
    relation_ranks: int = 1
    """GPUs of a group that shares out the relations."""
    time: StepTime | None
    run: RunCost | None
    tiers: tuple[TierUse, ...]
    considered: int
    strategies: tuple[StrategyVerdict, ...] = stored_as("families")
    knobs: tuple[KnobReason, ...]
    pareto: tuple[ParetoPoint, ...]
    remarks: tuple[str, ...]
    deepspeed_config: dict[str, Any]


class NoPlan(Schema):
    """Why nothing fits, and changes that would fit."""

    strategies: tuple[StrategyVerdict, ...] = stored_as("families")
    advice: tuple[Advice, ...]
    """Advice, cheapest first, hybrids last; `changes` of a hybrid are fields of the model."""


class Outcome(Schema):
    """State of the search for a choice, and what it found."""

    state: State
    message: str = ""
    field: str | None = None
    """Form field that a rejection is about."""
    plan: PlanView | None = None
    no_plan: NoPlan | None = None


class WorkerResult(NamedTuple):
    """Result that a worker process returns, as JSON: pickled schemas would be several times as large."""

    outcome: bytes
    """The `Outcome`."""
    plan: bytes | None
    """The complete plan, if one was found."""


_PLAN: TypeAdapter[Plan] = TypeAdapter(Plan)


@lru_cache(maxsize=2048)
def costs_of(choice: Choice) -> Costs:
    """Return the exact costs of a choice.

    Raises:
        ChoiceError: if a field is invalid; names it.
    """
    question = search_input(choice)
    described = compare_operators(question.spec, 1, DtypeSizes.of_training(question.training, "cuda"))
    rows = tuple(
        OperatorCost(
            operator=costs.operator,
            label=OPERATOR_LABELS[costs.operator],
            parameters=costs.parameters.total,
            in_tables=costs.parameters.components.get(TABLES, 0),
            state_bytes=costs.training_state_bytes,
            saved_bytes=costs.activations.ours,
            published_saved_bytes=costs.activations.published,
            training_flops=costs.flops.training_step,
        )
        for costs in described
    )
    return Costs(
        model=question.spec.name,
        family=question.spec.family,
        tokens=question.spec.tokens,
        components=described[0].parameters.components,
        operators=rows,
        command=choice_command(choice),
    )


def _capacity(tier: Tier, cluster: ClusterSpec) -> int | None:
    if tier == "device":
        return cluster.device_memory_bytes
    node_bytes = cluster.nvme_bytes if tier == "nvme" else cluster.host_memory_bytes
    return None if node_bytes is None else node_bytes // cluster.ranks_per_node


_TIER_WORDS = {Tier.DEVICE: "GPU", Tier.HOST: "pageable host"}


def _tiers(prediction: MemoryEstimate, cluster: ClusterSpec) -> tuple[TierUse, ...]:
    uses = []
    for tier in prediction.tiers:
        worst = prediction.worst(tier)
        assert worst is not None  # `tiers` are those that hold anything.
        low, high = (prediction.device_interval_bytes or (None, None)) if tier == "device" else (None, None)
        uses.append(
            TierUse(
                tier=tier,
                name=_TIER_WORDS.get(tier) or tier_name(tier),
                peak_bytes=worst.bytes,
                capacity_bytes=_capacity(tier, cluster),
                low_bytes=low,
                high_bytes=high,
                phase=worst.phase,
                site=worst.site,
                breakdown=worst.breakdown,
            )
        )
    return tuple(uses)


def plan_view(result: SearchResult) -> PlanView:
    """Return the parts of a search result that the page shows."""
    plan = result.plan
    cluster, training = plan.cluster, plan.training
    return PlanView(
        cluster=cluster.name,
        nodes=cluster.nodes,
        ranks=cluster.world_size,
        stage=plan.zero.stage,
        strategy=next(verdict.strategy for verdict in result.strategies if verdict.chosen),
        checkpointing=plan.model.checkpointing,
        micro_batch=training.micro_batch,
        accumulation=training.gradient_accumulation_steps,
        global_batch=training.global_batch(cluster.world_size),
        tile_relations=plan.tile_relations,
        relation_ranks=plan.parallel.relation,
        time=plan.time,
        run=plan.run_cost,
        tiers=_tiers(plan.prediction, cluster),
        considered=result.considered,
        strategies=result.strategies,
        knobs=result.knobs,
        pareto=result.pareto,
        remarks=config_warnings(training, plan.zero),
        deepspeed_config=plan.deepspeed_config(),
    )


def _no_plan(error: NoPlanFits) -> NoPlan:
    hybrids = tuple(Advice(kind="hybrid", text=describe_hybrid(row), changes=row.changes) for row in error.hybrids)
    return NoPlan(strategies=error.strategies, advice=(*error.advice, *hybrids))


def search_choice(choice: Choice) -> WorkerResult:
    """Search the best plan as ``translution plan`` does; runs in a worker process.

    Args:
        choice: a choice that `search_input` accepts.
    """
    try:
        question: SearchInput = search_input(choice)
        result = search_plan(question.spec, question.cluster, question.training, question.constraints)
    except NoPlanFits as error:
        outcome = Outcome(state="nothing fits", message=str(error), no_plan=_no_plan(error))
        return WorkerResult(outcome.model_dump_json().encode(), None)
    except InputError as error:
        refusal = choice_error(error, choice)
        outcome = Outcome(state="refused", message=refusal.message, field=refusal.field)
        return WorkerResult(outcome.model_dump_json().encode(), None)
    outcome = Outcome(state="found", plan=plan_view(result))
    return WorkerResult(outcome.model_dump_json().encode(), result.plan.model_dump_json().encode())


def plan_zip(plan_json: bytes) -> bytes:
    """Return a zip file with one folder named ``plan``: the plan folder as ``translution plan`` writes it.

    Args:
        plan_json: the plan of a `WorkerResult`.
    """
    plan = parse_json(_PLAN, plan_json, PLAN_FILE)
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "plan"
        write_plan_folder(plan, target)
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(target.iterdir()):
                archive.write(path, f"plan/{path.name}")  # Keeps the executable bits.
    return buffer.getvalue()
