from .step_time import RunCost as RunCost
from .step_time import StepTime as StepTime
