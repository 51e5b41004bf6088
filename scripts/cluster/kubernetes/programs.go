// Copyright 2026 The KubeDiffusion Authors
// SPDX-License-Identifier: Apache-2.0

//go:build tools

// Package tools names the programs that scripts/cluster/assets builds, so that go.mod and go.sum pin
// all that they are made of. k8s.io/kubernetes asks for its staging modules at v0.0.0: go.mod replaces
// each by its tagged release. etcd is here because `go install` refuses modules with replace lines.
package tools

import (
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-controller-manager"
	_ "k8s.io/kubernetes/cmd/kube-proxy"
	_ "k8s.io/kubernetes/cmd/kube-scheduler"
	_ "k8s.io/kubernetes/cmd/kubectl"
	_ "k8s.io/kubernetes/cmd/kubelet"
)
