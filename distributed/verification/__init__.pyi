from .measured_run import few_steps as few_steps
from .measured_run import measure_plan as measure_plan
from .rehearsal import Rehearsal as Rehearsal
from .rehearsal import format_layers as format_layers
from .rehearsal import predict_rehearsal as predict_rehearsal
from .rehearsal import read_rehearsal as read_rehearsal
from .rehearsal import rehearse as rehearse
from .rehearsal_rank import rehearse_rank as rehearse_rank
