from .experiment import experiment_cells as experiment_cells
