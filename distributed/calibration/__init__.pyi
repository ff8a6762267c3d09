from .run import calibrate as calibrate
from .run import calibrate_rank as calibrate_rank
from .run import calibrate_to_file as calibrate_to_file
