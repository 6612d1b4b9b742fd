"""Run a trained model. `from utils.predict import annotate` labels cells in memory."""


def __getattr__(name: str):
    """Import `annotate` when it is asked for, so that importing a module of this folder stays quick."""
    if name == "annotate":
        from utils.predict.label import annotate

        return annotate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
