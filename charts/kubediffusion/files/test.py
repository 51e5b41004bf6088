# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""`helm test`: draw one image as any client of the OpenAI images API would."""

import base64
import os
import sys
import time

import httpx

PNG = b"\x89PNG\r\n\x1a\n"


def main() -> str:
    """What was drawn. Exits with what was wrong."""
    key = (os.environ.get("API_KEYS", "").split() or ["none"])[0]
    deadline = time.monotonic() + float(os.environ["TIMEOUT"])
    with httpx.Client(
        base_url=os.environ["GATEWAY"], headers={"Authorization": f"Bearer {key}"}, timeout=10
    ) as gateway:
        workflow = os.environ["WORKFLOW"] or first_workflow(gateway, deadline)
        print(f"drawing with {workflow}: {os.environ['PROMPT']}", flush=True)
        begin = time.monotonic()
        answer = gateway.post(
            "/v1/images/generations",
            json={"model": workflow, "prompt": os.environ["PROMPT"], "seed": 7},
            timeout=max(1.0, deadline - begin),
        )
        if answer.status_code != 200:
            sys.exit(f"the gateway answered {answer.status_code}: {answer.text[:2000]}")
    image = base64.b64decode(answer.json()["data"][0]["b64_json"])
    if not image.startswith(PNG):
        sys.exit(f"that is no PNG: {image[:16]!r}")
    return f"a PNG of {len(image)} bytes after {time.monotonic() - begin:.1f} s"


def first_workflow(gateway: httpx.Client, deadline: float) -> str:
    """The gateway's first, once it can be reached and has one."""
    why = ""
    while time.monotonic() < deadline:
        try:
            answer = gateway.get("/v1/models")
            if answer.status_code == 401:
                sys.exit(f"the gateway refuses the API key: {answer.text[:2000]}")
            answer.raise_for_status()
            if found := answer.json()["data"]:
                return found[0]["id"]
            sys.exit(
                "no workflow is served: apply one, such as examples/tiny-sd3.yaml, "
                "and look at it with kubectl get dwf"
            )
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            time.sleep(1)
    sys.exit(f"the gateway cannot be reached: {why}")


if __name__ == "__main__":
    print(main())
