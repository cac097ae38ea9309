{{/* true or nothing. */}}
{{- define "hub.on" -}}
{{- if has (toString .) (list "1" "t" "T" "TRUE" "true" "True") }}true{{ end -}}
{{- end }}

{{- define "hub.tag" -}}
{{- .Values.tag | default (printf "v%s" .Chart.Version) -}}
{{- end }}

{{- define "hub.image" -}}
{{- with .Values.registry }}{{ . }}/{{ end }}{{ .Values.image }}:{{ include "hub.tag" . -}}
{{- end }}

{{/* The image of proxy servers or agents, which may have a tag or a digest of its own. Takes the root and what its value is called. */}}
{{- define "hub.tunnelImage" -}}
{{- $image := get .root.Values .value -}}
{{- if not $image }}{{ include "hub.image" .root }}
{{- else if regexMatch ":[^/]*$|@" $image }}{{ $image }}
{{- else }}{{ $image }}:{{ include "hub.tag" .root }}{{ end -}}
{{- end }}

{{/* Selectors of the pods, which are their labels. */}}
{{- define "hub.managerLabels" -}}
open-cluster-management.io/addon: cluster-proxy
component: cluster-proxy-manager
{{- end }}

{{- define "hub.userLabels" -}}
open-cluster-management.io/addon: cluster-proxy
component: cluster-proxy-addon-user
{{- end }}

{{/* These pods are made by the manager. */}}
{{- define "hub.serverLabels" -}}
proxy.open-cluster-management.io/component-name: proxy-server
{{- end }}

{{/* The namespace of the Placement. */}}
{{- define "hub.placementNamespace" -}}
{{- $given := .Values.installByPlacement | default dict -}}
{{- and $given.placementName $given.placementNamespace | default .Release.Namespace -}}
{{- end }}

{{- define "hub.exposedServices" -}}
{{- .Values.exposedServicesConfigMapName | default "cluster-proxy-exposed-services" -}}
{{- end }}

{{- define "hub.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{/* What both Deployments' pods have. Takes the root and the name of a template with the labels. */}}
{{- define "hub.pod" -}}
# Longer than anything in it takes to end.
terminationGracePeriodSeconds: 40
securityContext:
  runAsNonRoot: true
  seccompProfile:
    type: RuntimeDefault
{{- include "hub.pullSecrets" .root }}
{{- with .root.Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ $key }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include $.labels $.root | nindent 8 }}
  {{- end }}
{{- end }}

{{/* What all containers have. Takes the root and where their resources are. */}}
{{- define "hub.container" -}}
image: {{ include "hub.image" .root | quote }}
imagePullPolicy: IfNotPresent
securityContext:
  allowPrivilegeEscalation: false
  capabilities:
    drop:
      - ALL
  privileged: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
{{- with (.of).resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "hub.podNamespace" -}}
- name: POD_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
{{- end }}

{{/* Whether there are PodDisruptionBudgets: one for a single pod would only keep its node from being drained. */}}
{{- define "hub.budgets" -}}
{{- if and (include "hub.on" (.Values.podDisruptionBudget).enabled) (gt (.Values.replicas | int64) 1) }}true{{ end -}}
{{- end }}

{{/* Fails with all that is wrong with values that belong together. */}}
{{- define "hub.check" -}}
{{- $problems := list -}}
{{- $ingress := (.Values.userServer).ingress -}}
{{- if include "hub.on" ($ingress).enabled -}}
{{- if not (include "hub.on" .Values.enableServiceProxy) -}}
{{- $problems = append $problems "userServer.ingress.enabled needs enableServiceProxy: without it there is no user server" -}}
{{- end -}}
{{- if not $ingress.host -}}
{{- $problems = append $problems "userServer.ingress.host must be set with userServer.ingress.enabled" -}}
{{- end -}}
{{- end -}}
{{- $server := .Values.proxyServer -}}
{{- with $server.entrypointAddress -}}
{{- $label := "[A-Za-z0-9_]([-A-Za-z0-9_]*[A-Za-z0-9_])?" -}}
{{- if not (regexMatch (printf "^(%s(\\.%s)*|[0-9A-Fa-f.]*:[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)$" $label $label) .) -}}
{{- $problems = append $problems "proxyServer.entrypointAddress must be a host name or an IP address, without scheme, port, path and brackets; the port is proxyServer.port" -}}
{{- end -}}
{{- end -}}
{{- if and (not $server.entrypointAddress) (include "hub.on" $server.entrypointLoadBalancer) (eq ($server.port | int64) 8090) -}}
{{- $problems = append $problems "proxyServer.port must not be 8090 with proxyServer.entrypointLoadBalancer: that is the port of clients at the load balancer" -}}
{{- end -}}
{{- with .Values.registry -}}
{{- if not (regexMatch "^[A-Za-z0-9._:\\[\\]-]+(/[a-z0-9._-]+)*$" .) -}}
{{- $problems = append $problems "registry must be the name of a registry, such as registry.example:5000/team, without scheme and without a slash at the end" -}}
{{- end -}}
{{- end -}}
{{- with $problems }}{{ fail (join "; " .) }}{{ end -}}
{{- end }}

{{/* What all pods dial: DNS, which some distributions have on the second port, and apiservers. */}}
{{- define "hub.egress" -}}
- ports:
    - protocol: UDP
      port: 53
    - protocol: TCP
      port: 53
    - protocol: UDP
      port: 5353
    - protocol: TCP
      port: 5353
- ports:
    - protocol: TCP
      port: 443
    - protocol: TCP
      port: 6443
{{- end }}
