{{/* The image: a digest overrides the tag. */}}
{{- define "backstay.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* Labels of every object; call with a list of the root and the component. */}}
{{- define "backstay.labels" -}}
app.kubernetes.io/name: backstay
app.kubernetes.io/component: {{ index . 1 }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
{{- end }}

{{/* Labels that selectors use: must never change. */}}
{{- define "backstay.selector" -}}
app.kubernetes.io/name: backstay
app.kubernetes.io/component: {{ . }}
{{- end }}

{{/* TOML lines from a list of maps of settings; the later wins. JSON strings, numbers and booleans are valid TOML. */}}
{{- define "backstay.settings" -}}
{{- $settings := dict }}
{{- range . }}{{ range $name, $value := . }}{{ $_ := set $settings $name $value }}{{ end }}{{ end }}
{{- range $name, $value := $settings }}
{{ $name }} = {{ toJson $value }}
{{- end }}
{{- end }}

{{/* The scheme of a component's HTTP port; call with its values. */}}
{{- define "backstay.scheme" -}}
{{ if .settings.http_tls }}HTTPS{{ else }}HTTP{{ end }}
{{- end }}

{{/* Security context of all our containers: no privileges. */}}
{{- define "backstay.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
