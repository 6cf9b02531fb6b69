r"""Under the name of the module that the original has it in."""

from partpar.serving.feature_store import LocalFeatureStore, LocalTensorAttr

__all__ = ["LocalFeatureStore", "LocalTensorAttr"]
