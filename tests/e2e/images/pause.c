// Copyright 2026 The KubeDiffusion Authors
// SPDX-License-Identifier: Apache-2.0
// Holds a pod's namespaces, and reaps its orphans.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void down(int signal_number) { _exit(0); }

static void reap(int signal_number) {
  while (waitpid(-1, 0, WNOHANG) > 0) {
  }
}

int main(void) {
  signal(SIGINT, down);
  signal(SIGTERM, down);
  signal(SIGCHLD, reap);
  for (;;) pause();
}
