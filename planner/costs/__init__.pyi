from .optimizer import QUANTIZED_BLOCK as QUANTIZED_BLOCK
from .optimizer import SMALLEST_QUANTIZED as SMALLEST_QUANTIZED
from .parameters import TABLES as TABLES
from .parameters import count_parameters as count_parameters
from .parameters import operator_groups as operator_groups
from .parameters import sum_parameters as sum_parameters
from .parameters import table_tiles as table_tiles
from .workload import count_flops as count_flops
