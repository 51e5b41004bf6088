{{/* Copyright 2026 The KubeDiffusion Authors; SPDX-License-Identifier: Apache-2.0 */}}

{{- define "kubediffusion.monitored" -}}
namespaceSelector:
  {{- if .Values.operator.namespaced }}
  matchNames: [{{ .Release.Namespace }}]
  {{- else }}
  any: true
  {{- end }}
selector:
  matchExpressions:
    - key: app.kubernetes.io/component
      operator: In
      values: [gateway, operator, model-node]
    - key: app.kubernetes.io/managed-by
      operator: In
      values: [{{ .Release.Service }}, kubediffusion]
{{- end }}

{{- define "kubediffusion.endpoint" -}}
- port: metrics
  interval: {{ .Values.monitors.intervalSeconds }}s
  scrapeTimeout: {{ min .Values.monitors.intervalSeconds 3 }}s
  relabelings:
    # As the chart's own Prometheus names things.
    - action: replace
      replacement: kubediffusion
      targetLabel: job
    - action: replace
      sourceLabels: [__meta_kubernetes_pod_label_app_kubernetes_io_component]
      targetLabel: component
{{- end }}
