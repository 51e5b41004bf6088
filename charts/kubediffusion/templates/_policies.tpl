{{/* Copyright 2026 The KubeDiffusion Authors; SPDX-License-Identifier: Apache-2.0 */}}

{{- define "kubediffusion.policy.dns" -}}
- to:
    {{- toYaml .Values.networkPolicy.dns | nindent 4 }}
  ports:
    - port: 53
      protocol: UDP
    - port: 53
      protocol: TCP
{{- end }}

{{- define "kubediffusion.policy.apiServer" -}}
- to:
    - ipBlock:
        cidr: {{ .Values.networkPolicy.apiServer.cidr }}
  ports:
    {{- range .Values.networkPolicy.apiServer.ports }}
    - port: {{ . }}
      protocol: TCP
    {{- end }}
{{- end }}

{{- define "kubediffusion.policy.huggingFace" -}}
- to:
    - ipBlock:
        cidr: 0.0.0.0/0
    - ipBlock:
        cidr: ::/0
  ports:
    - port: 443
      protocol: TCP
{{- end }}

{{/* Takes (list root port): to the model nodes of the release's namespace, or of all. */}}
{{- define "kubediffusion.policy.nodes" -}}
{{- $root := index . 0 -}}
- to:
    - podSelector:
        {{- include "kubediffusion.nodeSelector" $root | nindent 8 }}
      {{- if not $root.Values.operator.namespaced }}
      namespaceSelector: {}
      {{- end }}
  ports:
    - port: {{ index . 1 }}
      protocol: TCP
{{- end }}

{{- define "kubediffusion.nodeSelector" -}}
matchLabels:
  app.kubernetes.io/managed-by: kubediffusion
  app.kubernetes.io/component: model-node
{{- end }}

{{/* Takes (list root component). */}}
{{- define "kubediffusion.policy.peer" -}}
podSelector:
  matchLabels:
    {{- include "kubediffusion.selector" . | nindent 4 }}
{{- end }}

{{/* To one's metrics: from the chart's own Prometheus, or whoever else scrapes. */}}
{{- define "kubediffusion.policy.metrics" -}}
{{- $peers := include "kubediffusion.scrapers" . | fromYamlArray }}
{{- if .Values.prometheus.enabled }}
{{- $peers = prepend $peers (include "kubediffusion.policy.peer" (list . "prometheus") | fromYaml) }}
{{- end -}}
- from:
    {{- toYaml $peers | nindent 4 }}
  ports:
    - port: 9090
      protocol: TCP
{{- end }}
