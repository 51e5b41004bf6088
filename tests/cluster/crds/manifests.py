# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Objects that the API server takes, and how to change them a little."""

from __future__ import annotations

import copy
from typing import Any

MISSING = object()
API = "kubediffusion.io/v1alpha1"

WORKFLOW: dict[str, Any] = {
    "apiVersion": API,
    "kind": "DiffusionWorkflow",
    "metadata": {"name": "w"},
    "spec": {
        "pipeline": {"preset": "StableDiffusion3", "source": {"uri": "hf://org/name"}},
        "controlNets": [{"name": "edges", "source": {"uri": "file:///weights"}}],
        "loras": [{"name": "ink", "source": {"uri": "builtin://x"}, "scale": "-0.5"}],
        "slo": {"latencyScale": "2.0"},
        "models": {
            "transformer": {
                "resources": {"limits": {"nvidia.com/gpu": "1", "memory": "16Gi"}},
                "scaling": {"minReplicas": 0, "maxReplicas": 4},
                "podTemplate": {"spec": {"tolerations": [{"operator": "Exists"}]}},
                "pruning": {"artifact": {"uri": "hf://org/pruned"}, "budget": "0.6"},
            },
            "text_encoder_3": {"enabled": False},
            "controlnet.edges": {"placement": {"pool": "small"}},
        },
        "inputs": {"steps": {"default": 20, "maximum": 50, "minimum": 1}},
    },
}
GRAPH: dict[str, Any] = {
    "apiVersion": API,
    "kind": "DiffusionWorkflow",
    "metadata": {"name": "g"},
    "spec": {
        "pipeline": {"family": "sd3", "source": {"uri": "builtin://tiny-sd3"}},
        "inputs": {
            "prompt": {"type": "text", "required": True},
            "strength": {"type": "number", "requires": "prompt"},
        },
        "graph": {
            "nodes": [{"name": "decode", "model": "vae", "stage": "decode"}],
            "output": "decode.image",
        },
    },
}
MODEL: dict[str, Any] = {
    "apiVersion": API,
    "kind": "DiffusionModel",
    "metadata": {"name": "vae-38f48d575a1bb2d51e5e"},
    "spec": {
        "family": "sd3",
        "component": "vae",
        "source": {
            "uri": "hf://org/name",
            "revision": "v1",
            "subfolder": "vae",
            "variant": "fp16",
        },
        "className": "AutoencoderKL",
        "dtype": "bfloat16",
        "attentionBackend": "native",
        "compile": "default",
        "quantization": "int8",
        "tiling": True,
        "pruning": {"artifact": {"uri": "hf://org/pruned"}},
        "replicas": 1,
    },
}
POOL: dict[str, Any] = {
    "apiVersion": API,
    "kind": "ModelPool",
    "metadata": {"name": "small"},
    "spec": {"replicas": 2, "memoryLimit": "20Gi"},
}


def changed(document: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """With values at paths such as `spec.loras.0.scale`; `MISSING` takes one out. In a path a
    backslash keeps a dot from dividing it."""
    document = copy.deepcopy(document)
    for path, value in changes.items():
        words = path.replace("\\.", "\0").split(".")
        *parents, last = (word.replace("\0", ".") for word in words)
        target: Any = document
        for part in parents:
            inner = isinstance(target, list)
            target = target[int(part)] if inner else target.setdefault(part, {})
        if value is MISSING:
            del target[last]
        else:
            target[last] = value
    return document
