"""The rules of rules.yaml for the Prometheus operator, written to the prometheusrule.yaml beside this file.

python k8s/monitoring/prometheusrule.py
"""

from pathlib import Path
from textwrap import indent

FILE = Path(__file__).with_name("prometheusrule.yaml")
_HEAD = """# Written by prometheusrule.py from rules.yaml; edit rules.yaml.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: training
spec:
"""


def to_yaml() -> str:
    """The rules, indented below ``spec``."""
    return _HEAD + indent(FILE.with_name("rules.yaml").read_text(), "  ")


if __name__ == "__main__":
    FILE.write_text(to_yaml())
