from .step_time import RunCost as RunCost
from .step_time import StepTime as StepTime
from .step_time import estimate_step_time as estimate_step_time
from .traffic import TrafficRow as TrafficRow
from .traffic import traffic_rows as traffic_rows
