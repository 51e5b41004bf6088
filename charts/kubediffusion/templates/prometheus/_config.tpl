{{/* Copyright 2026 The KubeDiffusion Authors; SPDX-License-Identifier: Apache-2.0 */}}
{{/* Prometheus' own configuration. Its labels `namespace`, `pod` and `component` are ours. */}}
{{- define "kubediffusion.prometheusConfig" -}}
global:
  scrape_interval: {{ .Values.prometheus.scrapeIntervalSeconds }}s
  scrape_timeout: {{ min .Values.prometheus.scrapeIntervalSeconds 3 }}s
  evaluation_interval: 15s
rule_files: [/etc/prometheus/alerts.yaml]
scrape_configs:
  - job_name: kubediffusion
    kubernetes_sd_configs:
      - role: pod
        {{- if .Values.operator.namespaced }}
        namespaces:
          names: [{{ .Release.Namespace }}]
        {{- end }}
        # The API server sends nothing else.
        selectors:
          - role: pod
            label: app.kubernetes.io/component in (gateway, operator, model-node)
    relabel_configs:
      # The chart's pods by part-of, the operator's by managed-by.
      - source_labels:
          - __meta_kubernetes_pod_label_app_kubernetes_io_part_of
          - __meta_kubernetes_pod_label_app_kubernetes_io_managed_by
        regex: kubediffusion;.*|.*;kubediffusion
        action: keep
      - source_labels: [__meta_kubernetes_pod_container_port_name]
        regex: metrics
        action: keep
      - source_labels: [__meta_kubernetes_pod_phase]
        regex: Succeeded|Failed
        action: drop
      - source_labels: [__meta_kubernetes_namespace]
        target_label: namespace
      - source_labels: [__meta_kubernetes_pod_name]
        target_label: pod
      - source_labels: [__meta_kubernetes_pod_label_app_kubernetes_io_component]
        target_label: component
{{- end }}
