"""Both estimators of need under one name: `need_cpu` and `need_memory` hold their laws, `need` what they share."""

from guestd.guest.core.need import EstimateSettings
from guestd.guest.core.need_cpu import CpuEstimator, CpuNeed
from guestd.guest.core.need_memory import MemoryEstimator, MemoryNeed

__all__ = ["CpuEstimator", "CpuNeed", "EstimateSettings", "MemoryEstimator", "MemoryNeed"]
