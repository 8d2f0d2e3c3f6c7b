{{- define "swaplora.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "swaplora.selector" -}}
app.kubernetes.io/name: swaplora
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "swaplora.labels" -}}
{{ include "swaplora.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "swaplora.model" -}}
{{- $embedded := dict "embedded" "smollm2-135m-instruct" "embedded-minilm" "all-minilm-l6-v2" -}}
{{- .Values.settings.served_model_name | default (get $embedded .Values.settings.base) | default (base .Values.settings.base) -}}
{{- end }}

{{- define "swaplora.portName" -}}
{{- .Values.integrations.productionStack.enabled | ternary "container-port" "http" -}}
{{- end }}

{{- define "swaplora.settings" -}}
{{- $own := dict "host" "0.0.0.0" "port" 8000 "data_dir" "/data" "cache_dir" "/cache/swaplora" "log_json" true "drain_seconds" .Values.drainSeconds -}}
{{- with .Values.adapters.existingClaim }}{{ $_ := set $own "adapter_dir" "/adapters" }}{{ end -}}
{{- with .Values.adapters.resolver }}{{ $_ := set $own "resolver" . }}{{ end -}}
{{- with .Values.adapters.allowSource }}{{ $_ := set $own "allow_source" . }}{{ end -}}
{{- with .Values.auth.keyFileSecret }}{{ $_ := set $own "key_file" (printf "/etc/swaplora/keys/%s" $.Values.auth.keyFileKey) }}{{ end -}}
{{- if .Values.auth.insecureNoAuth }}{{ $_ := set $own "insecure_no_auth" true }}{{ end -}}
{{- toYaml (merge $own .Values.settings) -}}
{{- end }}
