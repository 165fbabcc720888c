"""fedhpc: federated customization of large models as an HPC program."""

__version__ = "0.1.0"
