# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Certificates and kubeconfigs of a control plane for tests, by openssl."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

_EC_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def authority(folder: Path) -> None:
    """Make ``ca.crt`` and ``ca.key``, and ``sa.key`` which signs service accounts' tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    usage = "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"
    _openssl(
        *("req", "-x509", *_EC_KEY, "-keyout", folder / "ca.key", "-out", folder / "ca.crt"),
        *("-days", "3650", "-subj", "/CN=kube-ca", "-addext", usage),
    )
    _openssl(
        *("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", folder / "sa.key"),
    )


def certificate(folder: Path, name: str, subject: str, usage: str, names: str = "") -> None:
    """Make ``NAME.crt`` and ``NAME.key``, signed by the authority in `folder`.

    `usage` is ``serverAuth`` or ``clientAuth``; `names` a list for subjectAltName.
    """
    request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
    _openssl("req", *_EC_KEY, "-keyout", folder / f"{name}.key", "-subj", subject, "-out", request)
    lines = [f"extendedKeyUsage={usage}"] + ([f"subjectAltName={names}"] if names else [])
    extensions.write_text("\n".join(lines))
    _openssl(
        *("x509", "-req", "-in", request, "-CA", folder / "ca.crt", "-CAkey", folder / "ca.key"),
        *("-CAcreateserial", "-days", "3650", "-extfile", extensions),
        *("-out", folder / f"{name}.crt"),
    )


def write_kubeconfig(path: Path, server: str, ca: Path, token: str, namespace: str) -> Path:
    """JSON is YAML, so any client reads it."""
    cluster = {"server": server, "certificate-authority": str(ca)}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [
            {"name": "test", "context": {"cluster": "test", "user": "u", "namespace": namespace}}
        ],
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": token}}],
    }
    path.write_text(json.dumps(config, indent=1))
    path.chmod(0o600)
    return path


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]} failed: {done.stderr}")
