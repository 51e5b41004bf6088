{{/* Copyright 2026 The KubeDiffusion Authors; SPDX-License-Identifier: Apache-2.0 */}}

{{- define "kubediffusion.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Of 40 characters at most: "-prometheus" and the hash of a pod follow. */}}
{{- define "kubediffusion.fullname" -}}
{{- $name := include "kubediffusion.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Of objects outside namespaces: two releases of one name in two namespaces are no clash. */}}
{{- define "kubediffusion.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "kubediffusion.fullname" .) }}
{{- end }}

{{/* Takes (list root component). */}}
{{- define "kubediffusion.componentName" -}}
{{- printf "%s-%s" (include "kubediffusion.fullname" (index . 0)) (index . 1) }}
{{- end }}

{{/* Takes (list root component): what a component's pods are selected by; never changes. */}}
{{- define "kubediffusion.selector" -}}
app.kubernetes.io/name: {{ include "kubediffusion.name" (index . 0) }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Takes (list root component). */}}
{{- define "kubediffusion.labels" -}}
{{- $root := index . 0 -}}
{{ include "kubediffusion.selector" . }}
app.kubernetes.io/part-of: kubediffusion
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Takes (list root component): name, namespace and labels of an object of the release. */}}
{{- define "kubediffusion.metadata" -}}
name: {{ include "kubediffusion.componentName" . }}
namespace: {{ (index . 0).Release.Namespace }}
labels:
  {{- include "kubediffusion.labels" . | nindent 2 }}
{{- end }}

{{/* Takes (list root image). */}}
{{- define "kubediffusion.image" -}}
{{- $root := index . 0 }}{{ $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default $root.Chart.AppVersion }}
{{- end }}
{{- end }}

{{/* The restricted Pod Security level. 65532 is "nonroot" of the images. */}}
{{- define "kubediffusion.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "kubediffusion.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Takes the values of a component: where its pods run. */}}
{{- define "kubediffusion.scheduling" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "kubediffusion.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "kubediffusion.weightsClaim" -}}
{{- if .Values.weights.existingClaim }}
{{- .Values.weights.existingClaim }}
{{- else if .Values.weights.create }}
{{- include "kubediffusion.componentName" (list . "weights") }}
{{- end }}
{{- end }}

{{- define "kubediffusion.prometheusUrl" -}}
{{- if .Values.prometheus.enabled }}
{{- printf "http://%s.%s.svc:9090" (include "kubediffusion.componentName" (list . "prometheus")) .Release.Namespace }}
{{- else }}
{{- .Values.prometheus.url }}
{{- end }}
{{- end }}

{{- define "kubediffusion.apiKeysSecret" -}}
{{- if .Values.gateway.apiKeys.existingSecret }}
{{- .Values.gateway.apiKeys.existingSecret }}
{{- else if .Values.gateway.apiKeys.keys }}
{{- include "kubediffusion.componentName" (list . "api-keys") }}
{{- end }}
{{- end }}

{{/* What no single value is wrong in. */}}
{{- define "kubediffusion.validate" -}}
{{- if and .Values.weights.existingClaim .Values.weights.create }}
{{- fail "weights: either existingClaim, or create: true, not both" }}
{{- end }}
{{- if and .Values.gateway.apiKeys.existingSecret .Values.gateway.apiKeys.keys }}
{{- fail "gateway.apiKeys: either existingSecret, or keys, not both" }}
{{- end }}
{{- if and .Values.prometheus.enabled .Values.prometheus.url }}
{{- fail "prometheus.url is of a Prometheus of yours: set prometheus.enabled=false beside it" }}
{{- end }}
{{- with .Values.gateway.autoscaling }}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) }}
{{- fail "gateway.autoscaling.minReplicas is above maxReplicas" }}
{{- end }}
{{- end }}
{{- if and .Values.gateway.ingress.enabled (not .Values.gateway.ingress.hosts) }}
{{- fail "gateway.ingress.hosts is empty: name at least one host, such as images.example.com" }}
{{- end }}
{{- end }}

{{/* Takes 512Mi or 2Gi. */}}
{{- define "kubediffusion.mebibytes" -}}
{{- $number := . | trimSuffix "Mi" | trimSuffix "Gi" | int }}
{{- if hasSuffix "Gi" . }}{{ mul $number 1024 }}{{ else }}{{ $number }}{{ end }}
{{- end }}

{{/* "true" where a client that was given an image's URL finds the gateway that keeps it. */}}
{{- define "kubediffusion.imageUrls" -}}
{{- $gateway := .Values.gateway -}}
{{- if kindIs "bool" $gateway.imageUrls -}}
{{- $gateway.imageUrls -}}
{{- else if eq $gateway.service.sessionAffinity "ClientIP" -}}
true
{{- else if $gateway.autoscaling.enabled -}}
false
{{- else -}}
{{- le (int $gateway.replicas) 1 -}}
{{- end -}}
{{- end -}}
