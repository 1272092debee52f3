"""Planning: which elements become one operator, as what, and why the others stay apart."""

from convmerge.plan.joins import Junction, plan_junction, units
from convmerge.plan.planner import WINDOW, Planner
from convmerge.plan.siblings import Siblings, plan_siblings
from convmerge.plan.site import ChainPlan, Denial, Site, ends_of, site_numbers

__all__ = [
    "WINDOW",
    "ChainPlan",
    "Denial",
    "Junction",
    "Planner",
    "Siblings",
    "Site",
    "ends_of",
    "plan_junction",
    "plan_siblings",
    "site_numbers",
    "units",
]
