"""CDCDA-mobile, the cloud half: a user's history in, a LoRA adapter out."""

__version__ = "0.1.0"
