# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""An external metrics API as prometheus-adapter serves it, for one rule of its configuration."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.cluster.kube import ControlPlane, Kube
from tests.cluster.pki import certificate
from tests.cluster.scaling.measured import RealPrometheus

GROUP, VERSION = "external.metrics.k8s.io", "v1beta1"
ROOT = f"/apis/{GROUP}/{VERSION}"


class ExternalMetrics:
    """Serves the rule on a port of 127.0.0.1, and is registered as an APIService until closed."""

    def __init__(
        self, plane: ControlPlane, admin: Kube, prometheus: RealPrometheus, rule: Mapping[str, Any]
    ) -> None:
        self._admin, self._prometheus, self._rule = admin, prometheus, rule
        certificate(plane.pki, "external-metrics", "/CN=localhost", "serverAuth", "DNS:localhost")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(
            plane.pki / "external-metrics.crt", plane.pki / "external-metrics.key"
        )
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._register(self._server.server_port)

    def close(self) -> None:
        self._admin.delete("APIService", f"{VERSION}.{GROUP}")
        self._admin.delete("Service", "external-metrics", "default")
        self._server.shutdown()
        self._server.server_close()

    def values(self, namespace: str, name: str, selector: str) -> list[dict[str, Any]]:
        """As the adapter: the rule's query with the namespace and the labels filled in."""
        assert name == self._rule["name"]["as"]
        labels = [f'namespace="{namespace}"']
        labels += [f"{k}={json.dumps(v)}" for k, v in _pairs(selector)]
        query = self._rule["metricsQuery"].replace("<<.LabelMatchers>>", ",".join(labels))
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return [
            {"metricName": name, "metricLabels": {}, "timestamp": now, "value": f"{value:.3f}"}
            for _, value in self._prometheus.query(query)
        ]

    def _register(self, port: int) -> None:
        service = {"name": "external-metrics", "namespace": "default", "port": port}
        self._admin.apply(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "external-metrics", "namespace": "default"},
                "spec": {"type": "ExternalName", "externalName": "localhost"},
            }
        )
        self._admin.apply(
            {
                "apiVersion": "apiregistration.k8s.io/v1",
                "kind": "APIService",
                "metadata": {"name": f"{VERSION}.{GROUP}"},
                "spec": {
                    "group": GROUP,
                    "version": VERSION,
                    "service": service,
                    "insecureSkipTLSVerify": True,
                    "groupPriorityMinimum": 100,
                    "versionPriority": 100,
                },
            }
        )

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        metrics = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                parts = url.path.removeprefix(ROOT).strip("/").split("/")
                if len(parts) == 3:  # namespaces/NAME/METRIC
                    selector = parse_qs(url.query).get("labelSelector", [""])[0]
                    items = metrics.values(parts[1], parts[2], selector)
                    self._answer("ExternalMetricValueList", items=items)
                else:
                    self._answer("APIResourceList", groupVersion=f"{GROUP}/{VERSION}", resources=[])

            def _answer(self, kind: str, **fields: Any) -> None:
                about = "v1" if kind == "APIResourceList" else f"{GROUP}/{VERSION}"
                body = json.dumps({"kind": kind, "apiVersion": about, **fields}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def _pairs(selector: str) -> list[tuple[str, str]]:
    return [(key, value) for key, _, value in (p.partition("=") for p in selector.split(",") if p)]
