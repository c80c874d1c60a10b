"""The supervisor: starts children in order, restarts those that end, ends them in reverse order."""

from shmstore.supervisor.children import ChildInfo
from shmstore.supervisor.supervisor import Supervisor

__all__ = ["ChildInfo", "Supervisor"]
