from .step_time import RunCost as RunCost
from .step_time import StepTime as StepTime
from .step_time import estimate_step_time as estimate_step_time
