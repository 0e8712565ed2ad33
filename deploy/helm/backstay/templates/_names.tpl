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

{{/* Lines of TOML from a list of maps of settings; the later wins. Texts, numbers and switches of JSON are those of TOML. */}}
{{- define "backstay.settings" -}}
{{- $settings := dict }}
{{- range . }}{{ range $name, $value := . }}{{ $_ := set $settings $name $value }}{{ end }}{{ end }}
{{- range $name, $value := $settings }}
{{ $name }} = {{ toJson $value }}
{{- end }}
{{- end }}

{{/* How a component's HTTP port is asked; call with its values. */}}
{{- define "backstay.scheme" -}}
{{ if .settings.http_tls }}HTTPS{{ else }}HTTP{{ end }}
{{- end }}

{{/* What every container of ours may do: nothing. */}}
{{- define "backstay.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
