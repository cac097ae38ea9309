{{/* Whether a value is true, which may be a text: so customized variables of the hub's add-on manager are. */}}
{{- define "agent.on" -}}
{{- if has (toString .) (list "1" "t" "T" "TRUE" "true" "True") }}yes{{ end -}}
{{- end }}

{{/* The selector of the agent's pods, which is their labels. */}}
{{- define "agent.labels" -}}
open-cluster-management.io/addon: cluster-proxy
proxy.open-cluster-management.io/component-name: proxy-agent
{{- end }}

{{/* An object of texts. */}}
{{- define "agent.map" -}}
{{- range $key, $value := . }}
{{ $key | quote }}: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "agent.toleration" -}}
{{- range $key := list "key" "operator" "value" "effect" }}
{{- with get $ $key }}
{{ $key }}: {{ . | quote }}
{{- end }}
{{- end }}
{{- if not (kindIs "invalid" .tolerationSeconds) }}
tolerationSeconds: {{ .tolerationSeconds | int64 }}
{{- end }}
{{- end }}

{{- define "agent.image" -}}
{{- with .Values.registry }}{{ . }}/{{ end -}}
{{- .Values.image -}}
{{- if .Values.digest -}}
{{- with .Values.tag }}:{{ . }}{{ end -}}
@{{ .Values.digest }}
{{- else -}}
:{{ .Values.tag | default (printf "v%s" .Chart.Version) }}
{{- end -}}
{{- end }}

{{- define "agent.domain" -}}
{{- .Values.serviceDomain | default "svc.cluster.local" -}}
{{- end }}

{{/* A list as a text with commas, or what is one already. */}}
{{- define "agent.joined" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ join "," . }}{{ end -}}
{{- end }}

{{/* Whether the service proxy acts as users whom it has authenticated itself, and must be allowed to. */}}
{{- define "agent.impersonates" -}}
{{- if include "agent.on" .Values.enableServiceProxy -}}
{{- if or (include "agent.on" .Values.enableImpersonation) .Values.oidcIssuerURL -}}
yes
{{- end -}}
{{- range .Values.additionalServiceProxyArgs -}}
{{- if or (eq . "--oidc-issuer-url") (and (hasPrefix "--oidc-issuer-url=" .) (ne . "--oidc-issuer-url=")) -}}
yes
{{- end -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* The JSON object of required claims, as the only element of a list; anything else as an element that is no object. */}}
{{- define "agent.claims" -}}
{{- $list := fromJsonArray (printf "[%s]" .Values.oidcRequiredClaimsJSON) -}}
{{- if and (eq (len $list) 1) (kindIs "map" (first $list)) -}}
{{- toJson (first $list) -}}
{{- end -}}
{{- end }}

{{/* Fails with all that is wrong with values that belong together. */}}
{{- define "agent.check" -}}
{{- $problems := list -}}
{{- if include "agent.on" .Values.enableServiceProxy -}}
{{- $switches := 0 -}}
{{- $issuers := 0 -}}
{{- range .Values.additionalServiceProxyArgs -}}
{{- if or (eq . "--enable-impersonation") (hasPrefix "--enable-impersonation=" .) }}{{ $switches = add1 $switches }}{{ end -}}
{{- if or (eq . "--oidc-issuer-url") (hasPrefix "--oidc-issuer-url=" .) }}{{ $issuers = add1 $issuers }}{{ end -}}
{{- end -}}
{{- if not (has .Values.enableImpersonation (list "1" "t" "T" "TRUE" "true" "True" "0" "f" "F" "FALSE" "false" "False")) -}}
{{- $problems = append $problems "enableImpersonation must be true or false" -}}
{{- end -}}
{{- if $switches -}}
{{- $problems = append $problems "additionalServiceProxyArgs must not set --enable-impersonation; use enableImpersonation instead" -}}
{{- end -}}
{{- if gt (int $issuers) 1 -}}
{{- $problems = append $problems "additionalServiceProxyArgs must set --oidc-issuer-url at most once" -}}
{{- end -}}
{{- if and $issuers .Values.oidcIssuerURL -}}
{{- $problems = append $problems "configure the OIDC issuer with either oidcIssuerURL or --oidc-issuer-url in additionalServiceProxyArgs, not both" -}}
{{- end -}}
{{- if ne (empty .Values.oidcIssuerURL) (empty .Values.oidcClientID) -}}
{{- $problems = append $problems "oidcIssuerURL and oidcClientID must be specified together" -}}
{{- end -}}
{{- if and .Values.oidcIssuerURL .Values.oidcRequiredClaimsJSON -}}
{{- $claims := include "agent.claims" . -}}
{{- if not $claims -}}
{{- $problems = append $problems "oidcRequiredClaimsJSON must be a JSON object" -}}
{{- else -}}
{{- $others := 0 -}}
{{- range fromJson $claims }}{{ if not (kindIs "string" .) }}{{ $others = add1 $others }}{{ end }}{{ end -}}
{{- if $others -}}
{{- $problems = append $problems "oidcRequiredClaimsJSON values must be strings" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (and .Values.serviceProxySecretCert .Values.serviceProxySecretKey) -}}
{{- $problems = append $problems "serviceProxySecretCert and serviceProxySecretKey must be set when enableServiceProxy is true" -}}
{{- end -}}
{{- end -}}
{{- if and (include "agent.on" .Values.includeStaticProxyAgentSecret) (not (and .Values.staticProxyAgentSecretCert .Values.staticProxyAgentSecretKey)) -}}
{{- $problems = append $problems "staticProxyAgentSecretCert and staticProxyAgentSecretKey must be set when includeStaticProxyAgentSecret is true" -}}
{{- end -}}
{{- if and (include "agent.on" .Values.enableKubeApiProxy) (not .Values.clusterName) -}}
{{- $problems = append $problems "clusterName must be set when enableKubeApiProxy is true" -}}
{{- end -}}
{{- with $problems }}{{ fail (join "; " .) }}{{ end -}}
{{- end }}

{{/* What all containers have. Takes the root and the container's name. */}}
{{- define "agent.container" -}}
{{- $id := printf "deployments:cluster-proxy-proxy-agent:%s" .name -}}
imagePullPolicy: IfNotPresent
securityContext:
  allowPrivilegeEscalation: false
  capabilities:
    drop:
      - ALL
  privileged: false
  runAsNonRoot: true
  readOnlyRootFilesystem: true
{{- $found := false }}
{{- range reverse ((.root.Values.global).resourceRequirements | default list) }}
{{- if and (mustRegexMatch .containerIDRegex $id) (not $found) }}
{{- $found = true }}
resources:
  {{- toYaml (.resources | default dict) | nindent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "agent.podNamespace" -}}
- name: POD_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
{{- end }}

{{- define "agent.ownToken" -}}
- name: kube-api-access
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- end }}
