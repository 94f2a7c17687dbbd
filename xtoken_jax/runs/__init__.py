"""A run's folder: whose it is, and what can be taken out of it."""

from xtoken_jax.runs.agreement import agree, agree_on, agree_on_settings
from xtoken_jax.runs.folder import claim, contents, day_of, finished
from xtoken_jax.runs.run_file import RUN_FILE, SWEEP_FOLDER
from xtoken_jax.runs.student import export_checkpoint, export_student, folders_to_keep

__all__ = [
    "RUN_FILE", "SWEEP_FOLDER", "agree", "agree_on", "agree_on_settings", "claim", "contents", "day_of",
    "export_checkpoint", "export_student", "finished", "folders_to_keep",
]  # fmt: skip
