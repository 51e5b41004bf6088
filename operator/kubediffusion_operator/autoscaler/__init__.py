# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""How many replicas each model has, by its demand as Prometheus knows it.

prometheus   a typed client for instant queries
reading      which queries, and what they say of a model's demand          `demand_of` is pure
observe      that, and the cluster's objects, as cases for `scaling`       pure
status       decisions as conditions and history                           pure
driver       the loop: read, decide, write
"""

from kubediffusion_operator.autoscaler.driver import Autoscaler
from kubediffusion_operator.autoscaler.prometheus import Prometheus

__all__ = ["Autoscaler", "Prometheus"]
