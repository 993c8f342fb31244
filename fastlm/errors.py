"""Every error fastlm raises on purpose. The CLI prints one as a single line; anything else is a defect."""


class FastlmError(Exception):
    """What was wrong, where, and what to do. Base of all the others."""


class NativeCoreError(FastlmError, ImportError):
    """The compiled core (`fastlm._native`) is needed and was not built."""


class BackendError(FastlmError, RuntimeError):
    """No backend, or not the one that was forced, can serve this call."""


class DataError(FastlmError, ValueError):
    """A data file is missing, empty, corrupt or does not fit the request."""


class TokenizerError(FastlmError, ValueError):
    """A vocabulary file is corrupt, or a text or id is outside what the tokenizer covers."""


class CheckpointError(FastlmError, ValueError):
    """A checkpoint is missing, truncated, or does not match the model."""


class ConfigError(FastlmError, ValueError):
    """An option or combination of options makes no sense."""


class CapacityError(FastlmError, ValueError):
    """A request is larger than what can ever be served."""


class InferenceError(FastlmError, RuntimeError):
    """A model gave nothing that can be used: its outputs are not finite."""


class TrainingError(FastlmError, RuntimeError):
    """Training cannot go on: the loss or the gradients stay not finite."""
