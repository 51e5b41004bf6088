# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""The OpenAI images API over a gateway: what each module does, in the order of a request.

    body        reads a request within its limits, as JSON or as a form
    fields      every field that a request may have, and which are honoured, ignored or refused
    requests    fields -> GenerateRequest
    responses   GenerateEvents -> an answer or server-sent events, in the format asked for
    files       keeps images for answers by `url`
    errors      the error hierarchy -> OpenAI's error body
    routes      the endpoints

docs/openai.md is the users' side of this.
"""
