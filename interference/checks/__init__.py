"""audit: are the derivatives of this very model right? Every route to them is compared with every other one."""

from interference.checks.comparison import audit
from interference.checks.result import Audit, Check

__all__ = ["Audit", "Check", "audit"]
