from .definitions import find_experiment as find_experiment
from .runner import EXPERIMENT_RESULT as EXPERIMENT_RESULT
from .runner import ExperimentResult as ExperimentResult
from .runner import Summary as Summary
from .runner import Trial as Trial
from .runner import run_experiment as run_experiment
