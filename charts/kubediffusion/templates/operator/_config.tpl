{{/* Copyright 2026 The KubeDiffusion Authors; SPDX-License-Identifier: Apache-2.0 */}}

{{/* The operator's configuration file; its type is kubediffusion_operator.config.OperatorConfig. */}}
{{- define "kubediffusion.operatorConfig" -}}
{{- if .Values.operator.namespaced }}
namespace: {{ .Release.Namespace }}
{{- end }}
image: {{ include "kubediffusion.image" (list . .Values.image.node) }}
imagePullPolicy: {{ .Values.image.node.pullPolicy }}
device: {{ .Values.nodes.device }}
{{- with include "kubediffusion.nodeDefaults" . | fromYaml }}
nodeDefaults:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "kubediffusion.weightsClaim" . }}
weights:
  claimName: {{ . }}
  readOnly: {{ $.Values.weights.readOnly }}
{{- end }}
{{- with .Values.hfToken }}
{{- if .secretName }}
hfTokenSecret:
  name: {{ .secretName }}
  key: {{ .key }}
{{- end }}
{{- end }}
# Each gateway serves the namespace that it is in.
gateway:
  selector:
    app.kubernetes.io/part-of: kubediffusion
    app.kubernetes.io/component: gateway
  {{- if .Values.gateway.enabled }}
  endpoint: http://{{ include "kubediffusion.componentName" (list . "gateway") }}.{namespace}.svc:8080
  {{- end }}
operator:
  namespace: {{ .Release.Namespace }}
  selector:
    {{- include "kubediffusion.selector" (list . "operator") | nindent 4 }}
{{- with include "kubediffusion.operatorPrometheus" . }}
prometheus:
  {{- . | nindent 2 }}
{{- end }}
networkPolicies:
  enabled: {{ .Values.networkPolicy.enabled }}
  huggingFace: {{ .Values.networkPolicy.huggingFace }}
  {{- with .Values.networkPolicy.nodesEgress }}
  extraEgress:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  dns:
    {{- toYaml .Values.networkPolicy.dns | nindent 4 }}
  {{- with include "kubediffusion.scrapers" . | fromYamlArray }}
  scrapers:
    {{- toYaml . | nindent 4 }}
  {{- end }}
scaling:
  enabled: {{ ne (include "kubediffusion.prometheusUrl" .) "" }}
  gpuResource: {{ .Values.nodes.gpuResource }}
  {{- if ne .Values.nodes.gpuBudget nil }}
  gpuBudget: {{ .Values.nodes.gpuBudget }}
  {{- end }}
logLevel: {{ .Values.logLevel }}
{{- end }}

{{/* The user's podTemplate, with what the chart says of all pods. */}}
{{- define "kubediffusion.nodeDefaults" -}}
{{- $pods := deepCopy .Values.nodes.podTemplate }}
{{- $spec := dict }}
{{- with .Values.imagePullSecrets }}
{{- $spec = dict "imagePullSecrets" . }}
{{- end }}
{{- with merge (get $pods "spec" | default dict) $spec }}
{{- $_ := set $pods "spec" . }}
{{- end }}
{{- with $pods }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{- define "kubediffusion.operatorPrometheus" -}}
{{- with include "kubediffusion.prometheusUrl" . -}}
url: {{ . }}
{{- end }}
{{- /* Three scrapes, and not less than the operator's own 30 s. */}}
{{- $interval := ternary .Values.prometheus.scrapeIntervalSeconds .Values.monitors.intervalSeconds .Values.prometheus.enabled | int }}
{{- if gt $interval 10 }}
staleSeconds: {{ mul 3 $interval }}
{{- end }}
{{- if .Values.prometheus.enabled }}
namespace: {{ .Release.Namespace }}
selector:
  {{- include "kubediffusion.selector" (list . "prometheus") | nindent 2 }}
{{- else if .Values.prometheus.auth.secretName }}
{{- with .Values.prometheus.auth.tokenKey }}
bearerTokenFile: /etc/prometheus-access/{{ . }}
{{- end }}
{{- with .Values.prometheus.auth.caKey }}
caFile: /etc/prometheus-access/{{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* NetworkPolicyPeers that may read metrics, beside the chart's own Prometheus. */}}
{{- define "kubediffusion.scrapers" -}}
{{- if or (not .Values.prometheus.enabled) (ne .Values.monitors.kind "none") }}
{{- toYaml .Values.networkPolicy.scrapers }}
{{- else -}}
[]
{{- end }}
{{- end }}
