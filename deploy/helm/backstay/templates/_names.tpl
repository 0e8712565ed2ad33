{{/* The image: a digest wins over a tag. */}}
{{- define "backstay.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* Labels of everything; call with a list of the root and the component. */}}
{{- define "backstay.labels" -}}
app.kubernetes.io/name: backstay
app.kubernetes.io/component: {{ index . 1 }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
{{- end }}

{{/* Labels that selectors use: never changed. */}}
{{- define "backstay.selector" -}}
app.kubernetes.io/name: backstay
app.kubernetes.io/component: {{ . }}
{{- end }}

{{/* Lines of TOML from a map of settings. */}}
{{- define "backstay.settings" -}}
{{- range $name, $value := . }}
{{ $name }} = {{ if kindIs "string" $value }}{{ $value | quote }}{{ else }}{{ $value }}{{ end }}
{{- end }}
{{- end }}

{{/* What every container of ours may do: nothing. */}}
{{- define "backstay.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
